"""Watching: W1..W6 of k8s/watch.py, on the pure machine, and on a server over real HTTP: storms, a thousand pods."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kubernetes.client import Configuration

from k8s.api import JOBS, PODS, Api
from k8s.errors import ApiUnavailable, Expired, NotAllowed
from k8s.kubeconfig import Access
from k8s.views import PodView, pod_view
from k8s.watch import List, ObjectWatcher, Wait, WatchMachine, WatchPace, WatchRequest
from tests.k8s.api_server import ApiServer, pod

QUICK = WatchPace(watch_s=2.0, idle_s=5.0, relist_s=60.0, backoff_s=0.05, backoff_max_s=0.4, stable_s=0.3)
PODS_AT = "/api/v1/namespaces/train/pods"
JOB = {"metadata": {"name": "x-k1", "uid": "j1", "labels": {"hotstage.dev/run": "x"}}, "spec": {"completions": 2}}


def until(true: Callable[[], object], what: str, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.01)


def api_of(server: ApiServer) -> Api:
    configuration = Configuration()
    configuration.host = server.url
    return Api(Access(configuration))


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        yield made


@pytest.fixture
def watcher(server: ApiServer) -> Iterator[ObjectWatcher[PodView]]:
    made = ObjectWatcher(api_of(server), PODS, "train", "hotstage.dev/run=x", pod_view, QUICK, seed=1)
    yield made
    made.stop()


def started(watcher: ObjectWatcher[PodView]) -> ObjectWatcher[PodView]:
    watcher.start()
    assert watcher.wait_synced(60.0)
    return watcher


# --- the pure machine -----------------------------------------------------------------------------------------


def machine(**pace: Any) -> WatchMachine:
    return WatchMachine(WatchPace(**pace), random.Random(1))


def test_first_a_list_then_watches_from_its_version() -> None:
    m = machine()
    assert m.next(0.0) == List()
    m.listed(0.0, "41")
    assert m.next(0.0) == WatchRequest("41", 50.0)
    m.opened(0.0)
    m.seen(1.0, "57")
    m.closed(50.0)
    assert m.next(50.0) == WatchRequest("57", 50.0)


def test_the_whole_is_listed_again_after_a_while_and_watches_end_before_that() -> None:
    m = machine(relist_s=100.0)
    m.listed(0.0, "1")
    action = m.next(60.0)
    assert isinstance(action, WatchRequest)
    assert 1.0 <= action.timeout_s <= 50.0
    assert m.next(111.0) == List()


def test_a_410_lists_anew_and_is_no_silence() -> None:
    m = machine()
    m.listed(0.0, "1")
    m.opened(0.0)
    m.failed(20.0, Expired("old"))
    assert m.failing_since is None
    assert isinstance(m.next(20.0), Wait)
    assert m.next(20.6) == List()


@pytest.mark.parametrize("error", [ApiUnavailable("500"), Expired("410")])
def test_a_storm_of_errors_is_bounded(error: Exception) -> None:
    """However often the server refuses: at most about two requests per longest pause (W1)."""
    m, now, requests = machine(), 0.0, 0
    while now < 3600.0:
        match m.next(now):
            case Wait(seconds):
                now += seconds
            case List():
                requests += 1
                m.listed(now, "1")
            case WatchRequest():
                requests += 1
                m.opened(now)
                m.failed(now, error)  # type: ignore[arg-type]
    assert requests < 2 * 3600 / 15 + 20


def test_streams_that_end_at_once_are_no_hot_loop() -> None:
    m, now, requests = machine(), 0.0, 0
    m.listed(0.0, "1")
    while now < 3600.0:
        match m.next(now):
            case Wait(seconds):
                now += seconds
            case List():
                m.listed(now, "1")
            case WatchRequest():
                requests += 1
                m.opened(now)
                m.closed(now)
    assert requests < 3600 / 15 + 20


def test_a_stream_that_held_ends_the_backoff() -> None:
    m = machine()
    m.listed(0.0, "1")
    for _ in range(6):
        m.opened(0.0)
        m.failed(0.0, ApiUnavailable("500"))
    assert m.failures == 6
    m.opened(100.0)
    m.closed(150.0)
    assert (m.failures, m.failing_since) == (0, None)


def test_retry_after_is_honoured() -> None:
    m = machine()
    m.failed(0.0, ApiUnavailable("busy", retry_after_s=17.0))
    assert m.next(16.9) == Wait(pytest.approx(0.1))
    assert m.next(17.0) == List()


# --- over HTTP ------------------------------------------------------------------------------------------------


def test_pods_come_change_and_go(server: ApiServer, watcher: ObjectWatcher[PodView]) -> None:
    started(watcher)
    server.put(PODS_AT, pod("a", JOB, 0))
    server.put(PODS_AT, {**pod("b", JOB, 1), "metadata": {"name": "b", "labels": {"hotstage.dev/run": "other"}}})
    until(lambda: watcher.sight().objects, "the pod to be seen")
    server.change(PODS_AT, "a", phase="Failed")
    until(lambda: watcher.sight().objects["a"].phase == "Failed", "its change")
    server.remove(PODS_AT, "a")
    until(lambda: not watcher.sight().objects, "its end")
    sight = watcher.sight()
    assert (set(sight.gone), sight.gone["a"].phase) == ({"a"}, "Failed")
    assert server.count("GET", "list", "pods") == 1


def test_a_sight_is_made_anew_only_where_something_changed(server: ApiServer, watcher: ObjectWatcher[PodView]) -> None:
    server.put(PODS_AT, pod("a", JOB, 0))
    started(watcher)
    before = watcher.sight()
    server.put(PODS_AT, server.named("pods")["a"])  # a new version of the object, and nothing new in it
    server.put(PODS_AT, pod("b", JOB, 1))
    until(lambda: "b" in watcher.sight().objects, "the other pod")
    after = watcher.sight()
    assert after.changes == before.changes + 1
    assert watcher.sight().objects is after.objects
    assert set(before.objects) == {"a"}  # nobody's sight changes behind his back


def test_compacted_history_is_listed_anew(server: ApiServer, watcher: ObjectWatcher[PodView]) -> None:
    server.put(PODS_AT, pod("a", JOB, 0))
    started(watcher)
    with server.lock:  # nothing of this reaches the watch
        server.put(PODS_AT, pod("b", JOB, 1))
        server.remove(PODS_AT, "a")
        server.compact()
    until(lambda: set(watcher.sight().objects) == {"b"}, "the new list")
    assert "a" in watcher.sight().gone
    assert server.count("GET", "list", "pods") == 2


@pytest.mark.parametrize(("kind", "status"), [("watch", 500), ("watch", 410), ("watch", 429), ("list", 503)])
def test_storms_are_ridden_out(server: ApiServer, watcher: ObjectWatcher[PodView], kind: str, status: int) -> None:
    server.put(PODS_AT, pod("a", JOB, 0))
    started(watcher)
    server.storms[kind] = (status, "storm")
    server.compact()  # ends the watch that stands
    before = sum(server.requests.values())
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 1.2, "the storm")
    asked = sum(server.requests.values()) - before
    # the longest pause is 0.4 s here, half of it at least: a list and a watch each time; so many more on a busy machine
    assert asked <= 2 * (time.monotonic() - began) / 0.2 + 10
    assert set(watcher.sight().objects) == {"a"}  # what was known stays
    server.storms.clear()
    server.put(PODS_AT, pod("b", JOB, 1))
    until(lambda: set(watcher.sight().objects) == {"a", "b"}, "the calm")
    until(lambda: watcher.sight().failing_s == 0.0, "health")


def test_a_server_that_is_away_is_unknown_and_says_since_when(
    server: ApiServer, watcher: ObjectWatcher[PodView]
) -> None:
    server.put(PODS_AT, pod("a", JOB, 0))
    started(watcher)
    server.storms.update(list=(500, "away"), watch=(500, "away"))
    server.compact()
    until(lambda: watcher.sight().failing_s > 0.5, "half a second of silence")
    sight = watcher.sight()
    assert "away" in sight.error
    assert (sight.synced, set(sight.objects)) == (True, {"a"})


@pytest.mark.parametrize("verb", ["get", "watch"])
def test_an_answer_of_another_form_is_unknown_and_asked_again(server: ApiServer, verb: str) -> None:
    """As a proxy's sign-in page says it: the thread went with it, and what was there stood for ever."""
    real, odd = api_of(server), threading.Event()

    class Source:
        def get(self, path: str, query: Any = None, read_s: float = 20.0) -> Any:
            return {"sign": "in"} if odd.is_set() and verb == "get" else real.get(path, query, read_s)

        def watch(self, path: str, query: Any, timeout_s: int, idle_s: float) -> Iterator[Any]:
            return iter(["sign in"]) if odd.is_set() and verb == "watch" else real.watch(path, query, 1, idle_s)

    watcher = ObjectWatcher(Source(), PODS, "train", "hotstage.dev/run=x", pod_view, QUICK, seed=1)
    try:
        server.put(PODS_AT, pod("a", JOB, 0))
        started(watcher)
        odd.set()
        server.compact()
        until(lambda: watcher.sight().failing_s > 0.0, "the odd answer")
        assert set(watcher.sight().objects) == {"a"}
        odd.clear()
        server.put(PODS_AT, pod("b", JOB, 1))
        until(lambda: set(watcher.sight().objects) == {"a", "b"}, "the next answer")
    finally:
        odd.clear()
        watcher.stop()


def test_a_connection_that_says_nothing_is_given_up(server: ApiServer) -> None:
    pace = WatchPace(watch_s=0.5, idle_s=0.5, backoff_s=0.05, backoff_max_s=0.1)
    watcher = ObjectWatcher(api_of(server), PODS, "train", "hotstage.dev/run=x", pod_view, pace, seed=1)
    try:
        started(watcher)
        server.mute = True
        until(lambda: watcher.sight().failing_s > 0.0, "the silence to be noticed")
        server.mute = False
        until(lambda: watcher.sight().failing_s == 0.0, "the answer")
    finally:
        server.mute = False
        watcher.stop()


def test_a_thousand_pods_are_all_tracked(server: ApiServer, watcher: ObjectWatcher[PodView]) -> None:
    job = {**JOB, "spec": {"completions": 1000}}
    for index in range(600):
        server.put(PODS_AT, pod(f"p{index}", job, index, phase="Pending"))
    started(watcher)
    for index in range(600, 1000):
        server.put(PODS_AT, pod(f"p{index}", job, index, phase="Pending"))
    for index in range(1000):
        server.change(PODS_AT, f"p{index}", phase="Running")
    until(lambda: sum(p.phase == "Running" for p in watcher.sight().objects.values()) == 1000, "a thousand pods", 60.0)
    assert server.count("GET", "list", "pods") == 2  # one list of two pages
    # idle: nothing but watches that end by themselves each 2 s
    before = sum(server.requests.values())
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 1.0, "an idle second")
    asked = sum(server.requests.values()) - before
    assert asked <= 2 + (time.monotonic() - began)  # however long that second was


def test_an_api_error_says_what_was_asked(server: ApiServer) -> None:
    server.denied.add(("list", "jobs"))
    with pytest.raises(NotAllowed, match=r"cannot list resource.*jobs.*hotstage-launcher"):
        api_of(server).get(JOBS.path("train"))
