# SPDX-License-Identifier: Apache-2.0
"""The search for launch configurations: what it takes, what it discards, and when it ends."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import configs
from fastvit.kernels.ahead import model
from fastvit.kernels.ahead.launch import Launch
from fastvit.kernels.configs import Config
from fastvit.kernels.tuned import Attention, Kernels, Posed

from fastvit.tuning import ahead, candidates, device, problems, search
from fastvit.tuning.ahead import Job, Verdict

CONVIT_S = Attention("gpsa", "forward", "half", 256, 9, 196, 48, (14, 14))
TOY = Attention("gpsa", "forward", "half", 1, 1, 20, 16, (4, 5))
#: Half a per cent to both sides.
NOISE = (0.995, 1.0, 1.005)


class Fake:
    """A GPU whose times are what ``cost`` says, with noise."""

    def __init__(self, cost: Callable[[Kernels], float]) -> None:
        self.cost = cost
        self.sampled: list[Kernels] = []
        self.wrong: Callable[[Kernels], str] = lambda kernels: ""

    def expect(self, kernels: Kernels) -> None:
        pass

    def disagreement(self, kernels: Kernels) -> str:
        return self.wrong(kernels)

    def sampler(self, kernels: Kernels) -> Callable[[], float]:
        self.sampled.append(kernels)
        noise = itertools.cycle(NOISE)
        return lambda: self.cost(kernels) * next(noise)


def tile_warps(kernels: Kernels) -> int:
    return dict(kernels).get("forward_tile", Config(warps=0)).warps


def eight_are_faster(kernels: Kernels) -> float:
    return {4: 100.0, 8: 80.0}.get(tile_warps(kernels), 200.0)


def sound(kernels: Kernels, name: str) -> Verdict:
    return Verdict("", 1.0)


def tune(runner: Fake, **options: Any) -> search.Outcome | None:
    given = {"judge": sound, "floor": lambda kernels: 0.0, "left": lambda: 100.0, **options}
    problem = given.pop("problem", CONVIT_S)
    return search.tune(problem, "sm_90", runner, **given)


def test_the_faster_is_taken() -> None:
    found = tune(Fake(eight_are_faster))
    assert found is not None
    assert found.built_in == candidates.built_in(CONVIT_S, "sm_90")
    assert tile_warps(found.built_in) == 4
    assert tile_warps(found.chosen) == 8
    assert (found.before.median, found.after.median) == (100.0, 80.0)
    assert found.after.q20 < found.after.median < found.after.q80


def test_what_is_faster_within_the_spread_is_not() -> None:
    found = tune(Fake(lambda kernels: 99.9 if tile_warps(kernels) == 8 else 100.0))
    assert found is not None
    assert found.chosen == found.built_in


def test_a_lucky_screening_does_not_last() -> None:
    """Faster among many and not once more against what is built in."""
    calls: dict[Kernels, int] = {}

    def lucky(kernels: Kernels) -> float:
        calls[kernels] = calls.get(kernels, 0) + 1
        first = calls[kernels] <= search._SCREEN + search._ROUNDS
        return 50.0 if tile_warps(kernels) == 8 and first else 100.0

    found = tune(Fake(lucky))
    assert found is not None
    assert found.chosen == found.built_in
    assert found.after == found.before


def test_the_other_way_of_doing_it_is_tried() -> None:
    found = tune(Fake(lambda kernels: 10.0 if "forward_stream" in dict(kernels) else 100.0))
    assert found is not None
    assert [name for name, _ in found.chosen] == ["position_factors", "kronecker", "forward_stream"]


def test_each_kernel_of_a_call_is_improved() -> None:
    problem = CONVIT_S._replace(tokens=576, grid=(24, 24))

    def cost(kernels: Kernels) -> float:
        chosen = dict(kernels)
        slow = (chosen["kronecker"].warps != 8) + (chosen["forward_stream"].rows != 128)
        return 50.0 + 25.0 * slow

    found = tune(Fake(cost), problem=problem)
    assert found is not None
    assert found.before.median == 100.0
    assert found.after.median == 50.0


def test_what_spills_is_never_run() -> None:
    def judge(kernels: Kernels, name: str) -> Verdict:
        return Verdict("spills: 8 bytes" if tile_warps(kernels) == 8 else "", 1.0)

    runner = Fake(eight_are_faster)
    found = tune(runner, judge=judge)
    assert found is not None
    assert found.chosen == found.built_in
    assert found.spilled > 0
    assert not any(tile_warps(kernels) == 8 for kernels in runner.sampled)


def test_what_is_not_compiled_in_time_is_left_out() -> None:
    runner = Fake(eight_are_faster)
    found = tune(runner, judge=lambda kernels, name: None)
    assert found is not None
    assert found.late > 0
    assert set(runner.sampled) == {found.built_in}


def test_what_cannot_be_fast_enough_is_never_run() -> None:
    runner = Fake(eight_are_faster)
    found = tune(runner, floor=lambda kernels: 101.0 if tile_warps(kernels) == 8 else 1.0)
    assert found is not None
    assert found.slow > 0
    assert not any(tile_warps(kernels) == 8 for kernels in runner.sampled)


def test_what_disagrees_is_refused() -> None:
    runner = Fake(eight_are_faster)
    runner.wrong = lambda kernels: "out differs" if tile_warps(kernels) == 8 else ""
    found = tune(runner)
    assert found is not None
    assert found.chosen == found.built_in
    assert "out differs" in found.refused


def test_what_raises_costs_the_others_nothing() -> None:
    def cost(kernels: Kernels) -> float:
        return 60.0 if dict(kernels).get("forward_tile", Config()).rows == 32 else 100.0

    class Raising(Fake):
        def sampler(self, kernels: Kernels) -> Callable[[], float]:
            if tile_warps(kernels) == 8:
                raise RuntimeError("out of resource")
            return super().sampler(kernels)

    found = tune(Raising(cost))
    assert found is not None
    assert found.after.median == 60.0
    assert any("out of resource" in words for words in found.refused)


def test_the_search_ends_with_its_time() -> None:
    """What was found until then is kept; without any time nothing is begun."""
    runner = Fake(eight_are_faster)
    assert tune(runner, left=lambda: -1.0) is None
    assert runner.sampled == []
    now = [0.0]

    def judge(kernels: Kernels, name: str) -> Verdict:
        assert now[0] < 10.0, "asked after the time was over"
        now[0] += 1.0
        return Verdict("", 1.0)

    found = tune(runner, left=lambda: 10.0 - now[0], judge=judge)
    assert found is not None
    assert not found.complete
    assert now[0] <= 10.0


def test_what_was_compiled_is_measured_though_others_were_not_in_time() -> None:
    """Where compilers take longer than there is time, and for every kernel."""
    now = [0.0]

    def judge(kernels: Kernels, name: str) -> Verdict:
        now[0] += 1.0
        return Verdict("", 1.0)

    runner = Fake(lambda kernels: 100.0)
    found = tune(runner, left=lambda: 30.0 - now[0], judge=judge)
    assert found is not None
    assert not found.complete
    assert now[0] < 30.0
    own = dict(found.built_in)
    stream = dict(candidates.paths(CONVIT_S, "sm_90")[1])
    tried = [dict(kernels) for kernels in runner.sampled]
    assert any(k.get("forward_tile", own["forward_tile"]) != own["forward_tile"] for k in tried)
    for name in ("kronecker", "forward_stream"):
        assert any(k.get(name, stream[name]) != stream[name] for k in tried), name


def test_a_contest_ends_with_the_time() -> None:
    """After one round: of one sample no spread is known, so nothing wins."""
    now = [0.0]

    def cost(kernels: Kernels) -> float:
        now[0] += 1.0
        return eight_are_faster(kernels)

    found = tune(Fake(cost), left=lambda: 0.5 - now[0])
    assert found is not None
    assert now[0] == 1.0
    assert found.chosen == found.built_in


def test_a_few_samples_beat_nothing() -> None:
    """Of four each, all of one are below all of the other once in 70 times if they are alike."""
    for count in range(1, search._FEW):
        few = search.quantiles([1.0 + i for i in range(count)])
        assert not few.q80 < 1e9
        assert not few.q20 > 1e-9
    now = [0.0]

    def cost(kernels: Kernels) -> float:
        now[0] += 1.0
        return eight_are_faster(kernels)

    # Screening and the contest have ended; what is built in is met once more in four rounds.
    made = search._Search(CONVIT_S, "sm_90", Fake(cost), sound, float, lambda: 7.5 - now[0], None)
    first = candidates.built_in(CONVIT_S, "sm_90")
    eight = tuple((n, c._replace(warps=8) if "tile" in n else c) for n, c in first)
    times = made._timed([first, eight], 30)
    assert now[0] == 8.0
    assert times[eight].median < times[first].median
    assert not times[eight].q80 < times[first].q20


def test_an_outcome_says_whether_its_time_was_over() -> None:
    found = tune(Fake(eight_are_faster))
    assert found is not None
    assert found.complete
    now = [0.0]

    def judge(kernels: Kernels, name: str) -> Verdict:
        now[0] += 1.0
        return Verdict("", 1.0)

    found = tune(Fake(eight_are_faster), left=lambda: 10.0 - now[0], judge=judge)
    assert found is not None
    assert not found.complete


def test_on_the_way_only_what_is_faster_beyond_the_spread_is_taken() -> None:
    runner = Fake(lambda kernels: 99.9 if tile_warps(kernels) == 8 else 100.0)
    made = search._Search(CONVIT_S, "sm_90", runner, sound, lambda k: 0.0, lambda: 9.0, None)
    current = candidates.built_in(CONVIT_S, "sm_90")
    options = list(candidates.variants(CONVIT_S, "sm_90", current, "forward_tile"))
    eight = next(kernels for kernels in options if tile_warps(kernels) == 8)
    assert made._winner(current, [eight]) == current
    runner.cost = eight_are_faster
    assert made._winner(current, [eight]) == eight


def test_the_best_predicted_are_measured_first() -> None:
    def judge(kernels: Kernels, name: str) -> Verdict:
        config = dict(kernels)[name]
        return Verdict("", config.stages * 10.0 + config.warps)

    runner = Fake(lambda kernels: 100.0)
    tune(runner, judge=judge)
    tried = [k for k in runner.sampled[1:] if k != runner.sampled[0]][: search._MOST]
    assert dict(tried[0])["forward_tile"].stages == 1
    predicted = [judge(kernels, "forward_tile").predicted for kernels in tried]
    assert predicted == sorted(predicted)


def test_what_pads_the_least_is_compiled() -> None:
    asked = list(search.asked(CONVIT_S, "sm_90", lambda kernels: -tile_warps(kernels), 5))
    first = [kernels for kernels, name in asked if name == "forward_tile"]
    assert len(first) == 5
    assert {tile_warps(kernels) for kernels in first} == {8}


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
@pytest.mark.parametrize("arithmetic", ["half", "tf32", "ieee"])
def test_every_candidate_can_do_its_problem(arch: str, arithmetic: str) -> None:
    posed = problems.default(problems.OPS, arithmetic, arch)
    seen = {}
    for problem in posed:
        seen.setdefault(problem.kind, problem)
    for problem in seen.values():
        for kernels, name in search.asked(problem, arch, lambda kernels: 0.0, 20):
            assert problem.fitted(arch, kernels) == kernels, (problem.name, name)


def test_the_papers_shapes_come_first() -> None:
    found = problems.default(problems.OPS[:3], "half", "sm_90")
    assert [problem.name for problem in found[:3]] == [
        CONVIT_S.name,
        CONVIT_S._replace(direction="backward").name,
        CONVIT_S._replace(heads=16).name,
    ]
    assert len(set(found)) == len(found)
    ops = {problem.op for problem in found}
    assert {"gpsa", "mhsa", "stem_pair", "stem_conv", "stem_tokens", "stem_first"} <= ops
    assert {"stem_input_gradient", "stem_weight_gradient", "stem_image_gradient"} <= ops
    assert "gpsa_dropout" not in ops


def test_shapes_in_words() -> None:
    def parsed(text: str, *ops: str) -> list[Posed]:
        return problems.asked([text], ops or problems.OPS[:3], "half", "sm_90")

    assert [p.name for p in parsed("256x9x14x14x48")] == [
        CONVIT_S.name,
        CONVIT_S._replace(direction="backward").name,
    ]
    assert parsed("2x12x197x64")[0] == Attention("mhsa", "forward", "half", 2, 12, 197, 64, None)
    assert {problem.images for problem in parsed("1GF:8")} == {8}
    with pytest.raises(ValueError, match="did you mean 4GF"):
        parsed("4G")
    with pytest.raises(ValueError, match="is no shape; expected BxHxROWSxCOLUMNSxd"):
        parsed("14x14")
    with pytest.raises(ValueError, match="'4GF' is no shape of gpsa"):
        parsed("4GF", "gpsa")


def test_verdicts_by_hand() -> None:
    taken = {
        "stack": 0, "spills": 0, "registers": 128, "shared": 1024, "tensor_columns": 0,
        "instruction": "wgmma",
    }  # fmt: skip
    job = Job("sm_90", 90, CONVIT_S, "bfloat16", candidates.built_in(CONVIT_S, "sm_90"), "")
    launches = device.Problem(CONVIT_S, "bfloat16", "sm_90", torch.device("cpu")).launches(
        job.kernels
    )
    launch = launches[-1]

    def judged(**changes: Any) -> Verdict:
        return ahead.judged("sm_90", "half", {**taken, **changes}, launch)

    assert judged().reason == ""
    assert judged().predicted > 0
    assert judged(spills=3).reason.startswith("spills: 0 bytes, 3 instructions")
    assert judged(stack=8).reason.startswith("spills")
    assert "of shared memory, a block may have 232448" in judged(shared=228 * 1024).reason
    assert (
        ahead.judged("sm_90", "half", "Error: no", launch).reason == "does not compile: Error: no"
    )


def test_a_wave_that_is_not_full_is_predicted_to_take_longer() -> None:
    places = 2 * model.LIMITS["sm_90"].multiprocessors
    assert ahead._busy("sm_90", (places,), 2) == 1.0
    assert ahead._busy("sm_90", (places + 1, 1), 2) == pytest.approx(2 * places / (places + 1))


def test_candidates_are_compiled_in_other_processes() -> None:
    """One that is sound and one that spills, while this process interprets."""
    kernels = candidates.built_in(TOY, "sm_90")
    wide = CONVIT_S._replace(channels=128, tokens=256, grid=(16, 16))
    large = Config(rows=128, keys=(256,), channels=(128,), warps=4)
    spilling = (("position_table", Config()), ("forward_tile", large))
    with ahead.opened(1) as opened:
        good = Job("sm_90", 90, TOY, "bfloat16", kernels, "forward_tile")
        bad = Job("sm_90", 90, wide, "bfloat16", spilling, "forward_tile")
        for job in (good, bad):
            opened.ask(job)
        assert opened.verdict(good, 0.0) is None
        found = opened.verdict(good, 300.0)
        assert found is not None
        assert found.reason == ""
        assert found.predicted > 0
        found = opened.verdict(bad, 300.0)
        assert found is not None
        assert found.reason.startswith("spills: ")


def test_a_compiler_that_hangs_does_not_take_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    class Never:
        def get(self, seconds: float) -> Verdict:
            waited.append(seconds)
            raise multiprocessing.TimeoutError

    with ahead.opened(1) as opened:
        job = Job("sm_90", 90, TOY, "bfloat16", candidates.built_in(TOY, "sm_90"), "forward_tile")
        opened._found[job] = Never()
        for seconds in (1e9, 100.0, 20.0, 4.0, -1.0):
            assert opened.verdict(job, seconds) is None
    assert waited == [60.0, 25.0, 10.0, 4.0, 0.0]


def test_the_first_problem_waits_for_the_processes() -> None:
    with ahead.opened(1) as opened:
        times = [time.monotonic()]
        for seconds in (0.0, 300.0):
            opened.wait(seconds)
            times.append(time.monotonic())
    # A process does not import Triton in less.
    assert times[1] - times[0] < 0.1 < times[2] - times[1] < 300.0


def test_nothing_is_compiled_for_a_problem_whose_turn_is_over() -> None:
    """Others would wait for it in vain."""
    kernels, later = candidates.built_in(TOY, "sm_90"), TOY._replace(images=2)
    with ahead.opened(1) as opened:
        first, second = (
            Job("sm_90", 90, problem, "bfloat16", kernels, "forward_tile")
            for problem in (TOY, later)
        )
        opened.ask(first)
        opened.over(TOY)
        found = opened.verdict(second, 300.0)
        assert found is not None
        assert found.reason == ""
        found = opened.verdict(first, 300.0)
        assert found is not None
        assert found.reason == "the turn of its problem is over"


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_no_card_is_below_the_floor(arch: str) -> None:
    """As fast as the fastest of the architecture, with what kernels hand on kept in the cache."""
    # NVIDIA's data sheets, dense, float32 sums: TFLOP/s in half precision; TB/s.
    fastest = {
        "sm_80": (312, 2.04), "sm_89": (366, 1.01), "sm_90": (989, 4.8), "sm_100": (2500, 8.0),
        "sm_120": (504, 1.8),
    }[arch]  # fmt: skip
    problem = CONVIT_S._replace(tokens=576, grid=(24, 24), images=8)
    made = device.Problem(problem, "bfloat16", arch, torch.device("cpu"))
    launches = made.launches(candidates.built_in(problem, arch))
    found = ahead.floor(arch, "half", launches)
    done = [model.work(launch.kernel, launch.arguments) for launch in launches]
    limits = model.LIMITS[arch]
    # One generation has twice the units for exponentials.
    per_second = 2 * model.EXPONENTIALS_PER_CLOCK * limits.clock * limits.multiprocessors * 1e9
    best = max(
        sum(work.flops for work in done) / fastest[0] / 1e6,
        sum(work.exponentials for work in done) / per_second * 1e6,
        # q, k and v are read and the result is written, once.
        4 * 8 * 9 * 576 * 48 * 2 / fastest[1] / 1e6,
    )
    assert found < best


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands for a GPU here")
class TestDevice:
    """Launches in the interpreter."""

    def problem(self, posed: Posed = TOY) -> device.Problem:
        made = device.Problem(posed, "bfloat16", "sm_90", torch.device("cpu"))
        made.expect(candidates.built_in(posed, "sm_90"))
        return made

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_both_ways_agree(self, direction: str) -> None:
        posed = TOY._replace(direction=direction)
        made = self.problem(posed)
        for kernels in candidates.paths(posed, "sm_90"):
            assert made.disagreement(kernels) == ""
        assert made.sampler(kernels)() > 0

    def test_what_leaves_tokens_out_disagrees(self) -> None:
        made = self.problem()
        short = Config(rows=16, keys=(16,), channels=(16,))
        words = made.disagreement((("position_table", Config()), ("forward_tile", short)))
        assert words.startswith("out differs by ")

    def test_what_is_not_written_disagrees(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = self.problem()
        kernels = candidates.built_in(TOY, "sm_90")
        recorded = made.launches(kernels)
        monkeypatch.setattr(made, "launches", lambda kernels: recorded[:1])
        # The table is there, and what takes it is not.
        assert set(made._outputs) == {"out", "table"}
        found = made._run(kernels, poison=True)
        assert "out" not in found
        half = recorded[1]._replace(grid=(1, 1)) if len(recorded[1].grid) > 1 else recorded[1]
        monkeypatch.setattr(made, "launches", lambda kernels: [recorded[0], _shorter(half)])
        assert made.disagreement(kernels).startswith("out differs by nan")

    def test_sums_in_other_parts_are_compared(self) -> None:
        toy = problems.layers((3, 8, 16), (2,), 1, (9, 7), "half", "sm_90")
        posed = next(p for p in toy if p.op == "stem_weight_gradient")
        made = self.problem(posed)
        ((name, config),) = candidates.built_in(posed, "sm_90")
        other = config._replace(rows=16, keys=(16,), channels=(16,), groups=2)
        (one,), (two,) = (made.launches(((name, c),)) for c in (config, other))
        assert one.grid != two.grid
        assert made.disagreement(((name, other),)) == ""
        made._expected = {k: 1.1 * x for k, x in made._expected.items()}
        assert made.disagreement(((name, other),)).startswith("partials differs by ")


def _shorter(launch: Launch) -> Launch:
    """Told that there are fewer tokens."""
    return launch._replace(arguments={**launch.arguments, "N": launch.arguments["N"] - 4})
