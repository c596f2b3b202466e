"""The compiler's passes over schedules, one action at a time: slow, and as plain as their rules are written.

Nothing runs these but the tests, which hold the passes on columns against them (``test_columns.py``): the same rows,
the same slots, the same times, the same refusals.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from tests.trainer.plan.message_ends import MessageEnd
from trainer.errors import PlanError
from trainer.plan.memory import Interval, align
from trainer.plan.messages import UNIT_COST
from trainer.plan.rows import Action, Rows
from trainer.plan.simulate import CostModel, Instruction
from trainer.plan.timeline import Span


def stage_positions(rows: Rows) -> dict[int, int]:
    """Which position runs which stage, by the rows' own account. PlanError where a stage sits on two positions."""
    positions: dict[int, int] = {}
    for position, row in enumerate(rows):
        for action in row:
            if positions.setdefault(action.stage, position) != position:
                raise PlanError(
                    f"position {position}, {action}: stage {action.stage} already runs at position "
                    f"{positions[action.stage]}; a stage has one position"
                )
    return positions


def in_flight(rows: Rows) -> list[int]:
    """For every stage, in order, the most microbatches whose activations it holds at once.

    A microbatch is held from its ``RECV_F`` (else its ``F``) to its ``B`` or ``W``, whichever ends it.
    """
    last: dict[tuple[int, int], int] = {}  # where a (stage, microbatch) ends, as a place in its position's row
    for row in rows:
        for place, action in enumerate(row):
            if action.op in ("B", "I", "W"):
                last[action.stage, action.microbatch] = place
    peak: dict[int, int] = {}
    for row in rows:
        held: dict[int, set[int]] = {}
        for place, action in enumerate(row):
            mine = held.setdefault(action.stage, set())
            if action.op in ("RECV_F", "F"):
                mine.add(action.microbatch)
                peak[action.stage] = max(peak.get(action.stage, 0), len(mine))
            elif last.get((action.stage, action.microbatch)) == place:
                mine.discard(action.microbatch)
    return [peak.get(stage, 0) for stage in range(max(peak, default=-1) + 1)]


def check_schedule(
    rows: Rows, stages: int | None = None, microbatches: int | None = None, bound: Sequence[int] | None = None
) -> None:
    """Refuses rows that break S1 to S6. ``bound[s]``: most microbatches that stage s may hold (None: no bound)."""
    positions = stage_positions(rows)
    count = stages if stages is not None else max(positions, default=-1) + 1
    wrong = sorted(set(positions) ^ set(range(count)))
    if count < 1 or wrong:
        has = "is missing" if wrong and wrong[0] < count else "is one too many"
        raise PlanError(f"S1: stage {wrong[0] if wrong else 0} {has}: the schedule must run stages 0 to {count - 1}")
    total = microbatches
    if total is None:
        total = max((action.microbatch for row in rows for action in row), default=-1) + 1
    for position, row in enumerate(rows):
        _check_row(position, row, total)
    _check_runs(rows, positions)
    if bound is not None:
        for stage, peak in enumerate(in_flight(rows)):
            if peak > bound[stage]:
                raise PlanError(
                    f"S6: position {positions[stage]}, stage {stage}: {peak} microbatches in flight, the bound is "
                    f"{bound[stage]}; use 1f1b, or give the stage more memory"
                )


def _check_row(position: int, row: Sequence[Action], microbatches: int) -> None:
    seen: dict[tuple[int, str, int], int] = {}
    newest: dict[tuple[int, str], int] = {}
    for place, action in enumerate(row):
        if not action.is_compute:
            continue
        stage, op, microbatch = action.stage, action.op, action.microbatch
        where = f"position {position}, action {place}, {action}"
        if microbatch >= microbatches:
            raise PlanError(f"S2: {where}: microbatch {microbatch} is beyond the last, {microbatches - 1}")
        for part in "IW" if op == "B" else op:
            if (stage, part, microbatch) in seen:
                raise PlanError(f"S2: {where}: {part} of stage {stage}, microbatch {microbatch} was already done")
            if part == "I" and (stage, "F", microbatch) not in seen:
                raise PlanError(f"S3: {where}: before its forward {stage}F{microbatch}")
            if part == "W" and (stage, "I", microbatch) not in seen:
                raise PlanError(f"S3: {where}: before its input gradient {stage}I{microbatch}")
            if part != "F":
                before = newest.get((stage, part), -1)
                if before > microbatch:
                    raise PlanError(f"S4: {where}: after microbatch {before}; backward microbatches ascend on a stage")
                newest[stage, part] = microbatch
            seen[stage, part, microbatch] = place
    for stage in sorted({action.stage for action in row}):
        for microbatch in range(microbatches):
            for part in "FIW":
                if (stage, part, microbatch) not in seen:
                    wanted = part if part == "F" else f"{part} (or B)"
                    raise PlanError(
                        f"S2: position {position}: {wanted} of stage {stage}, microbatch {microbatch} is missing"
                    )


def _needs(action: Action, last_stage: int) -> tuple[int, str, int] | None:
    """What another stage must have done before this computation may start."""
    if action.op == "F" and action.stage > 0:
        return (action.stage - 1, "F", action.microbatch)
    if action.op in ("B", "I") and action.stage < last_stage:
        return (action.stage + 1, "I", action.microbatch)
    return None


def _check_runs(rows: Rows, positions: Mapping[int, int]) -> None:
    last_stage = max(positions)
    todo = [[action for action in row if action.is_compute] for row in rows]
    place = [0] * len(todo)
    done: set[tuple[int, str, int]] = set()
    moved = True
    while moved:
        moved = False
        for position, row in enumerate(todo):
            while place[position] < len(row):
                action = row[place[position]]
                need = _needs(action, last_stage)
                if need is not None and need not in done:
                    break
                done.add((action.stage, "I" if action.op == "B" else action.op, action.microbatch))
                place[position] += 1
                moved = True
    for position, row in enumerate(todo):
        if place[position] < len(row):
            action = row[place[position]]
            need = _needs(action, last_stage)
            assert need is not None
            raise PlanError(
                f"S5: position {position} can never start {action} (computation {place[position]} of its row): it "
                f"needs {need[1]} of stage {need[0]}, microbatch {need[2]}, which position {positions[need[0]]} does "
                "not reach"
            )


def insert_messages(rows: Rows, stages: int) -> list[list[Action]]:
    check_schedule(rows, stages)
    return _Player(rows, stages).play()


class _Player:
    """Plays compute-only rows on a clock of unit costs and writes down what each position does, messages included."""

    def __init__(self, rows: Rows, stages: int) -> None:
        self.rows, self.last_stage, self.positions = rows, stages - 1, stage_positions(rows)
        self.eager = len(self.positions) > len(rows)
        self.place = [0] * len(rows)
        self.clock = [0] * len(rows)
        self.out: list[list[Action]] = [[] for _ in rows]
        self.made: dict[tuple[int, str, int], int] = {}  # results that exist, (stage, F or I, microbatch): since when
        self.here: set[tuple[int, str, int]] = set()  # results that their consumer has
        self.owed: list[set[tuple[int, str, int]]] = [set() for _ in rows]  # made on a position and not yet sent

    def play(self) -> list[list[Action]]:
        while any(place < len(row) for place, row in zip(self.place, self.rows, strict=True)):
            best = (None if self.eager else self._choose(tight=True)) or self._choose(tight=False)
            assert best is not None, "check_schedule lets through only what can run"
            _, is_compute, _, position = best
            if is_compute:
                self._compute(position)
            else:
                self._message(position)
        return self.out

    def _choose(self, tight: bool) -> tuple[int, int, int, int] | None:
        """The earliest that can happen, messages first: (time, 1 for a computation, time of making, its position)."""
        best: tuple[int, int, int, int] | None = None
        for position, row in enumerate(self.rows):
            if self.place[position] == len(row):
                continue
            need = _needs(row[self.place[position]], self.last_stage)
            if need is None or need in self.here or (self.positions[need[0]] == position and need in self.made):
                option = None if tight and self.owed[position] else (self.clock[position], 1, 0, position)
            elif need in self.made and self.positions[need[0]] != position:
                option = (max(self.clock[position], self.clock[self.positions[need[0]]]), 0, self.made[need], position)
            else:
                option = None
            if option is not None and (best is None or option < best):
                best = option
        return best

    def _compute(self, position: int) -> None:
        action = self.rows[position][self.place[position]]
        self.place[position] += 1
        self.clock[position] += UNIT_COST[action.op]
        self.out[position].append(action)
        if action.op == "W":
            return
        key = (action.stage, "F" if action.op == "F" else "I", action.microbatch)
        self.made[key] = self.clock[position]
        goes_to = action.stage + (1 if action.op == "F" else -1)
        if 0 <= goes_to <= self.last_stage and self.positions[goes_to] != position:
            self.owed[position].add(key)

    def _message(self, receiver: int) -> None:
        action = self.rows[receiver][self.place[receiver]]
        need = _needs(action, self.last_stage)
        assert need is not None
        sender, kind = self.positions[need[0]], "F" if need[1] == "F" else "B"
        self.out[sender].append(Action(need[0], f"SEND_{kind}", action.microbatch))
        self.out[receiver].append(Action(action.stage, f"RECV_{kind}", action.microbatch))
        self.clock[sender] = self.clock[receiver] = max(self.clock[sender], self.clock[receiver])
        self.owed[sender].discard(need)
        self.here.add(need)


def check_channels(rows: Sequence[Sequence[MessageEnd]]) -> None:
    """Every send is matched by a receive of the same label, in order on its channel, and rendezvous does not deadlock.

    A channel has one sending and one receiving position. Works on any messages, those of the optimizer step included.
    """
    ends: dict[tuple[Hashable, bool], int] = {}
    lists: dict[tuple[Hashable, bool], list[tuple[int, int, MessageEnd]]] = {}
    for position, row in enumerate(rows):
        for place, message in enumerate(row):
            key = (message.channel, message.is_send)
            if ends.setdefault(key, position) != position:
                end = "sending" if message.is_send else "receiving"
                raise PlanError(
                    f"position {position}, message {place}, {message.text}: the {end} end of channel {message.channel} "
                    f"belongs to position {ends[key]}; a channel has one position at each end"
                )
            lists.setdefault(key, []).append((position, place, message))
    for channel, is_send in lists:
        ours, theirs = lists[channel, is_send], lists.get((channel, not is_send), [])
        for number, (position, place, message) in enumerate(ours):
            where = f"position {position}, message {place}, {message.text}"
            if number >= len(theirs):
                want = "receive" if is_send else "send"
                raise PlanError(f"{where}: no {want} matches it: channel {channel} has {len(theirs)} of them")
            other_rank, other_place, other = theirs[number]
            if other.label != message.label:
                raise PlanError(
                    f"{where}: is number {number} on channel {channel}, where position {other_rank} (message "
                    f"{other_place}) has {other.text}; both ends of a channel must keep one order"
                )
    _rendezvous(rows, ends)


def _rendezvous(rows: Sequence[Sequence[MessageEnd]], ends: Mapping[tuple[Hashable, bool], int]) -> None:
    place = [0] * len(rows)
    ready = list(range(len(rows)))
    while ready:
        position = ready.pop()
        while place[position] < len(rows[position]):
            mine = rows[position][place[position]]
            peer = ends[mine.channel, not mine.is_send]
            if peer == position:
                raise PlanError(
                    f"position {position}, message {place[position]}, {mine.text}: a position sends to itself; "
                    "both ends block"
                )
            if place[peer] == len(rows[peer]):
                break
            other = rows[peer][place[peer]]
            if other.channel != mine.channel or other.is_send == mine.is_send:
                break
            place[position] += 1
            place[peer] += 1
            ready.append(peer)
    blocked = [
        f"position {position} at message {place[position]}, {row[place[position]].text}, waits for position "
        f"{ends[row[place[position]].channel, not row[place[position]].is_send]}"
        for position, row in enumerate(rows)
        if place[position] < len(row)
    ]
    if blocked:
        raise PlanError("deadlock under rendezvous-only channels: " + "; ".join(blocked))


def check_lowered(rows: Rows) -> None:
    """The schedule with its messages: S1 to S5, then each message is where its computation needs it, then the channels.

    A channel is (kind, sending stage, receiving stage). Stages on one position need no message, and may have none.
    """
    check_schedule(rows)
    positions = stage_positions(rows)
    last_stage = max(positions)
    for position, row in enumerate(rows):
        _check_placement(position, row, positions, last_stage)
    check_channels(
        [
            [
                MessageEnd((action.op[-1], *action.edge), action.is_send, action.microbatch, str(action))
                for action in row
                if not action.is_compute
            ]
            for row in rows
        ]
    )


def _check_placement(position: int, row: Sequence[Action], positions: Mapping[int, int], last_stage: int) -> None:
    done: set[Action] = set()
    for place, action in enumerate(row):
        where = f"position {position}, action {place}, {action}"
        if action in done:
            raise PlanError(f"{where}: was already done")
        if action.is_compute:
            need = _needs(action, last_stage)
            if need is not None and positions[need[0]] != position:
                receive = Action(action.stage, f"RECV_{'F' if need[1] == 'F' else 'B'}", action.microbatch)
                if receive not in done:
                    raise PlanError(f"{where}: needs {receive} before it")
        else:
            sender, receiver = action.edge
            other = receiver if action.is_send else sender
            if other not in positions:
                raise PlanError(f"{where}: there is no stage {other}")
            if positions[other] == position:
                raise PlanError(
                    f"{where}: stages {sender} and {receiver} share position {position}; they need no message"
                )
            if action.op == "SEND_F" and Action(action.stage, "F", action.microbatch) not in done:
                raise PlanError(f"{where}: before {action.stage}F{action.microbatch} has made what it sends")
            made = {Action(action.stage, op, action.microbatch) for op in ("B", "I")}
            if action.op == "SEND_B" and not made & done:
                raise PlanError(f"{where}: before the backward of stage {action.stage} has made what it sends")
        done.add(action)
    for action in row:
        if action.op in ("F", "B", "I"):
            up = action.op == "F"
            other = action.stage + (1 if up else -1)
            send = Action(action.stage, "SEND_F" if up else "SEND_B", action.microbatch)
            if 0 <= other <= last_stage and positions[other] != position and send not in done:
                raise PlanError(f"position {position}: {action} is never sent on: {send} is missing")


def free_slots_early(rows: Sequence[Sequence[Action]]) -> list[list[Action]]:
    """The same messages, but a gradient leaves before the next activation enters, so that one slot serves both.

    Where stage s has ``RECV_F, SEND_B`` side by side and stage s-1 the matching ``SEND_F, RECV_B``, both pairs change
    places at once: two messages between the same two positions, next to each other at both ends, always may.
    Under 1F1B stage s then needs min(P - s, M) slots.
    """
    out = [list(row) for row in rows]
    place = [{action: n for n, action in enumerate(row)} for row in out]
    for position, row in enumerate(out):
        for n in range(len(row) - 1):
            taken, given = row[n], row[n + 1]
            if taken.op != "RECV_F" or given.op != "SEND_B" or taken.stage != given.stage:
                continue
            below = taken.stage - 1
            peer = next(r for r, p in enumerate(place) if Action(below, "SEND_F", taken.microbatch) in p)
            at = place[peer][Action(below, "SEND_F", taken.microbatch)]
            wanted = Action(below, "RECV_B", given.microbatch)
            if at + 1 == len(out[peer]) or out[peer][at + 1] != wanted:
                continue
            for r, first in ((position, n), (peer, at)):
                out[r][first], out[r][first + 1] = out[r][first + 1], out[r][first]
                place[r] |= {out[r][first]: first, out[r][first + 1]: first + 1}
    return out


def assign_slots(row: Sequence[Action]) -> tuple[int, dict[int, int]]:
    """How many slots a position's list needs, and which each microbatch takes.

    A slot is taken when the activation is received (on the first stage: at F) and free after the last of B and SEND_B.
    """
    last = {action.microbatch: place for place, action in enumerate(row) if action.op in ("B", "W", "SEND_B")}
    slots: dict[int, int] = {}
    held: dict[int, int] = {}
    count = 0
    for place, action in enumerate(row):
        mb = action.microbatch
        if mb not in slots:
            slots[mb] = held[mb] = next(n for n in range(count + 1) if n not in held.values())
            count = max(count, slots[mb] + 1)
        if last.get(mb) == place:
            del held[mb]
    return count, slots


def check_hazards(row: Sequence[Action], stage: int) -> None:
    """Refuses lists in which a gradient would be received over an activation that is not sent yet."""
    sent: set[int] = set()
    for place, action in enumerate(row):
        if action.op == "SEND_F":
            sent.add(action.microbatch)
        elif action.op == "RECV_B" and action.microbatch not in sent:
            raise PlanError(
                f"stage {stage}, action {place}, {action}: its gradient would be received over an activation that is "
                "not sent yet"
            )


def sent_at_once(row: Sequence[Action]) -> bool:
    """Whether every gradient is sent before the next is made."""
    owed: int | None = None
    for action in row:
        if action.op == "B":
            if owed is not None:
                return False
            owed = action.microbatch
        elif action.op == "SEND_B" and action.microbatch == owed:
            owed = None
    return True


def place(intervals: Sequence[Interval]) -> tuple[dict[str, int], int]:
    """First-fit offsets, multiples of 64, such that buffers alive at once never overlap; and the bytes in all.

    Large buffers are placed first, so that the small ones fill the gaps.
    """
    offsets: dict[str, int] = {}
    placed: list[tuple[Interval, int]] = []
    end = 0
    for item in sorted(intervals, key=lambda i: (-i.bytes, i.first, i.name)):
        size, at = align(item.bytes), 0
        busy = sorted(
            (offset, offset + align(other.bytes))
            for other, offset in placed
            if other.first <= item.last and item.first <= other.last
        )
        for low, high in busy:
            if at + size <= low:
                break
            at = max(at, high)
        offsets[item.name] = at
        placed.append((item, at))
        end = max(end, at + size)
    return offsets, end


def split_layers(costs: Sequence[int], head: int, stages: int) -> tuple[range, ...]:
    count = len(costs)
    if not 1 <= stages <= count:
        raise PlanError(f"{stages} stages cannot share {count} layers; every stage needs one: take 1..{count} stages")
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    total = sums[count] + head
    heaviest = _cut(sums, head, stages, total, max)[0]
    ends = _cut(sums, head, stages, heaviest, lambda stage, rest: stage * stage + rest)[1]
    return tuple(range(first, end) for first, end in zip((0, *ends), ends, strict=False))


def _cut(
    sums: Sequence[int], head: int, stages: int, limit: int, join: Callable[[int, int], int]
) -> tuple[int, tuple[int, ...]]:
    """The least ``join`` of all stages' costs where none passes ``limit``, and where the stages end.

    ``sums[n]`` is the cost of the first n layers; ``join(cost of a stage, join of the later ones)`` must not fall when
    either grows.
    """
    count = len(sums) - 1
    best: list[tuple[int, tuple[int, ...]] | None] = []  # by first layer, for the stages that are left
    for first in range(count + 1):
        last = sums[count] - sums[first] + head
        best.append((join(last, 0), (count,)) if first < count and last <= limit else None)
    for _ in range(stages - 1):
        now: list[tuple[int, tuple[int, ...]] | None] = []
        for first in range(count + 1):
            found: tuple[int, tuple[int, ...]] | None = None
            for end in range(first + 1, count):
                cost, rest = sums[end] - sums[first], best[end]
                if cost > limit:
                    break
                if rest is not None:
                    value = join(cost, rest[0])
                    if found is None or value < found[0]:
                        found = (value, (end, *rest[1]))
            now.append(found)
        best = now
    assert best[0] is not None, "one layer a stage always fits"
    return best[0]


def sends_at_once(row: Sequence[Instruction]) -> list[Instruction]:
    """Each send between stages right behind what makes it, or behind what lets the one before it on its channel go."""
    behind: dict[int, list[Instruction]] = {}
    made = {i.action.replace("I", "B"): place for place, i in enumerate(row) if i.channel is None}
    last: dict[int, int] = {}
    stays: list[int] = []
    for place, i in enumerate(row):
        maker = made.get(i.action.replace("SEND_", "")) if "SEND_" in i.action and i.channel is not None else None
        if maker is None:
            stays.append(place)
            continue
        assert i.channel is not None
        last[i.channel] = max(last.get(i.channel, -1), maker)
        behind.setdefault(last[i.channel], []).append(i)
    return [i for place in stays for i in (row[place], *behind.get(place, ()))]


def simulate(rows: Sequence[Sequence[Instruction]], cost: CostModel) -> tuple[list[Span], dict[tuple[int, int], int]]:
    """Events by rank and start, and bytes by link."""
    if not cost.rendezvous:
        rows = [sends_at_once(row) for row in rows]
    clock = [0.0] * len(rows)
    place = [0] * len(rows)
    events: list[Span] = []
    arrived: dict[int, list[tuple[int, float]]] = {}  # channel -> (sending rank, time at the receiver), in order
    link_bytes: dict[tuple[int, int], int] = {}
    receivers = {
        instruction.channel: rank
        for rank, row in enumerate(rows)
        for instruction in row
        if instruction.channel is not None and instruction.kind == "recv"
    }

    def ready(instruction: Instruction) -> bool:
        if instruction.channel is None:
            return True
        if instruction.kind == "recv":
            return bool(arrived.get(instruction.channel))
        if not cost.rendezvous:
            return True
        peer = receivers.get(instruction.channel)
        if peer is None or place[peer] == len(rows[peer]):
            return False
        other = rows[peer][place[peer]]
        return other.channel == instruction.channel and other.kind == "recv"

    def run(rank: int, instruction: Instruction) -> None:
        start = clock[rank]
        if instruction.channel is None:
            end = start + instruction.seconds
        elif instruction.kind == "recv":
            sender, when = arrived[instruction.channel].pop(0)
            end = max(start, when)
            link_bytes[sender, rank] = link_bytes.get((sender, rank), 0) + instruction.bytes
        else:
            met = max(start, clock[receivers[instruction.channel]]) if cost.rendezvous else start
            end = met + instruction.bytes / cost.link_bytes_per_s
            arrived.setdefault(instruction.channel, []).append((rank, end + cost.link_latency_s))
        events.append(Span(rank, instruction.action, instruction.kind, start, end, instruction.microbatch))
        clock[rank] = end
        place[rank] += 1

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while place[rank] < len(row) and ready(row[place[rank]]):
                run(rank, row[place[rank]])
                moved = True
    assert all(p == len(row) for p, row in zip(place, rows, strict=True))
    return sorted(events, key=lambda e: (e.rank, e.start)), link_bytes
