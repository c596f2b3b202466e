"""`hotstage train` under a real Prefect server: what its page shows, and that no failure of Prefect touches a run."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from flows.flow import spec_to_train
from flows.prefect_api import Client, Gone, Lost, Refused, answers
from tests.flows.conftest import Api, started
from tests.support.chaos import ask_to_stop, caught
from tests.support.front import Front
from tests.support.place import ROOT, STEPS, Place, finish
from tests.support.wait import wait_for
from trainer.errors import SpecError
from trainer.spec import load_spec

SLOW = ("train.microbatch=1", "model.width=128", "train.steps=150")  # long enough to act in the middle


def args(*sets: str) -> list[str]:
    return ["train", "spec.toml", *[item for s in sets for item in ("--set", s)]]


def metrics_begun(place: Place) -> bool:
    return any((place.folder / "store" / "runs").glob("*/live/*/metrics/*"))


def attempt_of(api: Api, flow_run: dict[str, Any]) -> dict[str, Any]:
    """The task run of the only attempt."""
    (task,) = [t for t in api.task_runs(flow_run["id"]) if t["name"].startswith("attempt")]
    return task


def test_a_run_is_a_completed_flow_run_with_its_artifacts(prefect: Api, hosted: Place, undisturbed: str) -> None:
    secrets = {"AWS_ACCESS_KEY_ID": "AKIAHOTSTAGETEST", "AWS_SECRET_ACCESS_KEY": "hotstage-test-secret-value"}
    hosted.env.update(secrets)
    done = hosted.call(*args(), "--json")
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1  # the result, nothing else on stdout; what goes on, as JSON too, on stderr
    result = done.json()
    events = [json.loads(line) for line in done.err.splitlines()]
    assert {"line", "attempt", "step", "checkpoint", "ended"} <= {event["event"] for event in events}
    assert (result["outcome"], result["state_digest"]) == ("succeeded", undisturbed)
    (flow_run,) = [
        f for f in prefect.named(result["run"]) if f["parameters"]["store"].endswith(str(hosted.folder / "store"))
    ]
    assert flow_run["state_type"] == "COMPLETED"

    artifacts = prefect.artifacts(flow_run["id"])
    progress = artifacts[result["run"]]
    assert (progress["type"], float(progress["data"])) == ("progress", 100.0)
    assert progress["description"] == f"step {STEPS} of {STEPS}, step {STEPS} saved"
    loss = artifacts[f"{result['run']}-loss"]["data"]
    curve = [json.loads(line) for line in hosted.said("logs", result["run"]).splitlines() if '"event":"step"' in line]
    assert "```mermaid\n" in loss
    assert "\nxychart-beta\n" in loss
    assert f"loss {curve[0]['loss']:.4f} → {curve[-1]['loss']:.4f} at step {STEPS}" in loss
    (attempt,) = json.loads(artifacts[f"{result['run']}-attempts"]["data"])
    assert (attempt["attempt"], attempt["from step"], attempt["because"]) == (1, 0, "start")
    shown = json.loads(hosted.said("runs", "show", result["run"], "--json"))
    assert [a["stages"] for a in shown["attempts_list"]] == [2]  # the spec's own layout, also inside the flow

    files = artifacts[f"{result['run']}-files"]["data"]
    assert f"| {STEPS} | `runs/{result['run']}/manifests/" in files
    assert str(hosted.folder / "store") in files
    wait_for(
        lambda: [row["state_type"] for row in prefect.task_runs(flow_run["id"])] == ["COMPLETED"] * 3,
        "the tasks",
        60,
        0.1,
    )  # the server records task runs a moment after it was told
    tasks = {row["name"]: row for row in prefect.task_runs(flow_run["id"])}
    assert {name: row["state_type"] for name, row in tasks.items()} == dict.fromkeys(
        ("prepare data", "compile plan", "attempt 1"), "COMPLETED"
    )
    assert tasks["attempt 1"]["total_run_time"] > 0
    logs = prefect.logs(flow_run["id"])
    assert any(line.startswith("attempt 1: at step 0") for line in logs)
    assert any(line.startswith(f"step {STEPS:>6}/{STEPS}") for line in logs)
    assert any(line.startswith("succeeded: step") for line in logs)

    told = json.dumps([flow_run, artifacts, logs, list(tasks.values())])
    for secret in secrets.values():
        assert secret not in told
        assert secret not in done.out + done.err


def test_a_run_that_gives_up_is_a_failed_flow_run(prefect: Api, hosted: Place) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        done = hosted.call(*args(f"launch.port_base={s.getsockname()[1]}", "name='gaveup'"), "--json")
    assert done.code == 78, done.err
    result = done.json()
    assert result["outcome"] == "gave_up"
    (flow_run,) = prefect.named(result["run"])
    assert flow_run["state_type"] == "FAILED"
    assert result["reason"] in flow_run["state"]["message"]
    assert all(json.loads(line) for line in done.err.splitlines())
    wait_for(lambda: attempt_of(prefect, flow_run)["state_type"] == "FAILED", "the attempt's end", 60, 0.1)
    assert attempt_of(prefect, flow_run)["state"]["message"] == result["reason"]


def test_what_a_person_types_into_the_form_holds_or_is_refused() -> None:
    """Settings beside a spec were passed over in silence, and so was a run's name: another run was trained."""
    spec = load_spec(ROOT / "examples" / "demo.toml", [])
    typed = spec_to_train(spec, "", ["train.seed=7", "parallel.stages=1"])
    assert typed is not None
    assert (typed.train.seed, typed.parallel.stages) == (7, 1)
    assert spec_to_train(spec, "", ()) is spec
    assert spec_to_train(None, "demo-1", ["parallel.stages=1"]) is None
    with pytest.raises(SpecError, match=r"no key train\.stepz; did you mean train.steps"):
        spec_to_train(spec, "", ["train.stepz=2"])
    with pytest.raises(SpecError, match=r"and run .demo-1. are both given: `spec`: null goes on with that run"):
        spec_to_train(spec, "demo-1", ())
    with pytest.raises(SpecError, match="neither spec nor run is given"):
        spec_to_train(None, "", ())


def test_a_stopped_run_is_a_cancelled_flow_run_and_goes_on(prefect: Api, hosted: Place) -> None:
    store = hosted.env.pop("HOTSTAGE_STORE")
    process = hosted.start(*args(*SLOW, "name='stopped'"), "--store", store, "--out", "there")
    with caught(hosted.folder, lambda: metrics_begun(hosted), "the first step"):
        ask_to_stop(process, signal.SIGINT, hosted.folder / "there")
    done = finish(process)
    assert done.code == 85, done.out + done.err
    said = re.search(r"go on with: hotstage runs resume (\S+) (.+)\n", done.out)
    assert said is not None
    assert said[2] == f"--store {store} --out there"  # the printed command finds the run
    name = said[1]
    (flow_run,) = prefect.named(name)
    assert flow_run["state_type"] == "CANCELLED"
    wait_for(lambda: attempt_of(prefect, flow_run)["state_type"] == "CANCELLED", "the attempt's end", 60, 0.1)
    assert "stopped" in flow_run["state"]["message"]


def test_nothing_answers_at_the_url(place: Place, undisturbed: str) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, never listening: connections are refused as long as the test lasts
        place.env["PREFECT_API_URL"] = f"http://127.0.0.1:{s.getsockname()[1]}/api"
        done = place.call(*args(), "--json")
    assert (done.code, done.json()["state_digest"]) == (0, undisturbed), done.err
    assert "Prefect does not answer" in done.err


@pytest.mark.slow
def test_the_server_is_killed_in_the_middle(place: Place, tmp_path: Path) -> None:
    server = started(tmp_path / "own")
    try:
        place.env.update({**server.environment(), "PREFECT_HOME": str(tmp_path / "prefect")})
        process = place.start(*args(*SLOW), "--json")
        assert server.process is not None
        with caught(place.folder, lambda: metrics_begun(place), "the first step"):
            os.killpg(server.process.pid, signal.SIGKILL)  # a session of its own: the server and all that it started
        done = finish(process)
    finally:
        server.stop()
    assert done.code == 0, done.err
    assert done.json()["outcome"] == "succeeded"
    assert "Prefect" in done.err
    assert "the run itself has ended" in done.err


def test_the_flow_s_process_is_killed_and_the_same_command_attaches(prefect: Api, hosted: Place) -> None:
    alone = hosted.train(*SLOW, "parallel.stages=1", "name='other'")["state_digest"]
    hosted_args = args(*SLOW, "name='killed'")
    process = hosted.start(*hosted_args, "--json")
    saved = hosted.folder / "store" / "runs"
    with caught(hosted.folder, lambda: any(saved.glob("killed-*/live/*/metrics/*")), "the first step"):
        name = next(iter(saved.glob("killed-*"))).name
        wait_for(lambda: [f for f in prefect.named(name) if f["infrastructure_pid"]], "its process", 60, 0.1)
        process.kill()
        process.communicate()
    done = hosted.call(*hosted_args, "--json")
    assert done.code == 0, done.err
    result = done.json()
    assert (result["attempts"], result["state_digest"]) == (1, alone)
    flow_runs = prefect.named(result["run"])
    assert sorted(f["state_type"] for f in flow_runs) == ["COMPLETED", "CRASHED"]
    (crashed,) = [f for f in flow_runs if f["state_type"] == "CRASHED"]
    assert crashed["state"]["message"].startswith(f"its process is gone (process {process.pid} on ")
    (completed,) = [f for f in flow_runs if f["state_type"] == "COMPLETED"]
    rows = json.loads(prefect.artifacts(completed["id"])[f"{result['run']}-attempts"]["data"])
    assert [row["attempt"] for row in rows] == [1]


def test_where_prefect_is_may_be_said_in_every_place_that_prefect_reads(tmp_path: Path) -> None:
    """profiles.toml, .env, prefect.toml and pyproject.toml, and the key of `prefect cloud login`."""
    program = (
        "from flows.prefect_api import configured, PrefectSettingsError\n"
        "try: print(configured())\nexcept PrefectSettingsError as e: print('REFUSED', e)"
    )
    url = "http://prefect.example:4200/api"
    cases = {
        "profile": (
            "home/profiles.toml",
            f'active = "team"\n[profiles.team]\nPREFECT_API_URL = "{url}"\nPREFECT_API_KEY = "k"\n',
        ),
        "env": (".env", f"PREFECT_API_URL={url}\n"),
        "toml": ("prefect.toml", f'[api]\nurl = "{url}"\n'),
        "pyproject": ("pyproject.toml", f'[tool.prefect.api]\nurl = "{url}"\n'),
        "nothing": ("other.toml", ""),
        "broken": ("home/profiles.toml", "active = [\n"),
    }
    running = {}
    for name, (path, text) in cases.items():
        folder = tmp_path / name
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
        env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
        env |= {"PREFECT_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
        running[name] = subprocess.Popen(
            [sys.executable, "-c", program], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    said = {name: finish(process, 120) for name, process in running.items()}
    for name, source in (
        ("profile", "the Prefect profile 'team'"),
        ("env", ".env"),
        ("toml", "prefect.toml"),
        ("pyproject", "pyproject.toml"),
    ):
        assert url in said[name].out, said[name]
        assert source in said[name].out
    assert said["nothing"].out.strip() == "None"
    assert said["broken"].code == 0, said["broken"].err


def test_a_storage_for_results_that_is_not_there_ends_no_flow(prefect: Api, hosted: Place) -> None:
    """Prefect opens it before a flow begins."""
    spec = load_spec(hosted.folder / "spec.toml")
    program = "import sys; from flows.flow import prepare_flow as p; from trainer.spec import RunSpec as S; "
    program += "print(p(S.model_validate_json(sys.argv[1]), sys.argv[2])['digest'])"
    before = {path.name for path in hosted.folder.iterdir()}
    store = (hosted.folder / "store").as_uri()
    wanted = {"PYTHONPATH": str(ROOT), "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK": "s3-bucket/not-there"}
    done = subprocess.run(
        [sys.executable, "-c", program, spec.model_dump_json(), store],
        cwd=hosted.folder,
        env={**hosted.env, **wanted},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch("[0-9a-f]{64}", done.stdout.split()[-1])
    assert {path.name for path in hosted.folder.iterdir()} <= {*before, "store"}, "nothing is kept"


def test_what_stands_before_a_server_is_not_taken_for_it(prefect: Api) -> None:
    """An address that sends requests on, a proxy whose server is away, and one that has the API elsewhere."""
    front, nobody = Front(prefect.server.api), str(uuid4())
    try:
        with Client.open(front.api) as client:
            assert not client.has_flow_run(nobody), "that is Prefect's own word"
            front.mode = "no server"
            with pytest.raises(Gone, match="answers 404 as Prefect does not: '404 page not found'") as gone:
                client.has_flow_run(nobody)
            assert not isinstance(gone.value, Lost)
            front.mode, front.message = 404, b'{"message": "no Route matched with those values"}'
            with pytest.raises(Gone, match=r"answers 404 as Prefect does not: .*no Route matched") as gone:
                client.has_flow_run(nobody)
            assert not isinstance(gone.value, Lost), "Kong's words are JSON too"
            front.mode, front.moves_to = "moved", front.api.removesuffix("/api")
            with pytest.raises(Gone, match=r"redirects\.; requests are sent on to the same address again"):
                client.check()
            front.moves_to = "http://127.0.0.1:port"
            with pytest.raises(Gone, match=r"Invalid port: .*; requests are sent on to http://127.0.0.1:port.*"):
                client.check()
            front.moves_to = prefect.server.api.removesuffix("/api")
            with pytest.raises(Refused, match=f"405.*; requests are sent on to {prefect.server.api}: set that as"):
                client.check()
            assert not client.has_flow_run(nobody), "what is only asked for is followed"
            front.mode = "pass"
            client.check()
        with Client.open(f"{front.api}/v2") as client, pytest.raises(Gone, match="Prefect's API is not there"):
            client.check()
    finally:
        front.close()


@pytest.mark.parametrize(
    ("api", "at", "told", "page"),
    [
        ("/api", "", "/v2", "/v2"),
        ("/prefect/api", "/prefect", "/prefect/v2", "/prefect/v2"),  # PREFECT_SERVER_UI_SERVE_BASE
        ("/prefect/api", "/prefect", "/v2", "/prefect/v2"),  # a proxy takes it away
        ("/prefect/api", "", "/v2", "/v2"),  # PREFECT_SERVER_API_BASE_PATH alone
        ("/prefect/api", "", "", ""),
        ("/prefect/api", "/elsewhere", "/elsewhere/v2", "/prefect"),
        ("/api", "", "", ""),
    ],
)
def test_the_page_of_a_server_below_a_path(api: str, at: str, told: str, page: str) -> None:
    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == f"{at}/ui-settings"
            self.send_response(200 if found else 404)
            self.end_headers()
            pages = {"default_ui": "v2" if told else "v1", "v1_base_url": at or "/", "v2_base_url": told or None}
            self.wfile.write(json.dumps(pages if found else {"detail": "Not Found"}).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing to the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        where = f"http://127.0.0.1:{server.server_port}"
        with Client.open(f"{where}{api}") as client:
            assert client.page_of("1") == f"{where}{page}/runs/flow-run/1"
        server.shutdown()
        thread.join()


def test_a_password_in_the_url_is_used_and_never_told(tmp_path: Path) -> None:
    """By a server that wants it, by one that refuses it, and where nobody answers."""
    given: list[str | None] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given.append(self.headers["Authorization"])
            self.send_response(200 if given[-1] == f"Basic {b64encode(b'ann:p@ss').decode()}" else 401)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Nothing to the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        where = f"127.0.0.1:{server.server_port}"
        assert answers(f"http://ann:p%40ss@{where}/api")
        assert not answers(f"http://ann:else@{where}/api")
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            urls = [f"http://ann:secretpw@{host}/api" for host in (where, f"127.0.0.1:{closed.getsockname()[1]}")]
            commands = [
                subprocess.Popen(
                    [sys.executable, "-m", "flows.cli", "schedules", "ls"],
                    cwd=tmp_path,
                    env=os.environ | {"PREFECT_API_URL": url, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                for url in urls
            ]
            refused, silent = (finish(command, 60) for command in commands)
        server.shutdown()
        thread.join()
    assert "not accepted" in refused.err
    assert f"no answer at {urls[1].replace('ann:secretpw@', '')}" in silent.err
    for said in (refused, silent):
        assert said.code == 78
        assert "secretpw" not in said.out + said.err
