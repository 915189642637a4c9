# SPDX-License-Identifier: Apache-2.0
"""How contests are timed and how a run keeps its time, with a GPU and a clock that are made up."""

from __future__ import annotations

import ctypes
import json
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_dry import gpu
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def device():
    return gpu("device").open_device(dry=True)


class TestTurns:
    def test_contenders_alternate(self, device):
        order: list[str] = []

        def maker(name: str) -> Any:
            return lambda: [lambda: order.append(name)]

        found = gpu("timing").compete(device, {"a": maker("a"), "b": maker("b")})
        rounds = device.plan.rounds
        assert order[-2 * rounds :] == ["a", "b"] * rounds
        assert len(found["a"]["samples"]) == len(found["b"]["samples"]) == rounds

    def test_one_that_fails_leaves_the_others(self, device):
        def refuses() -> Any:
            raise ValueError("no such shape")

        found = gpu("timing").compete(device, {"a": refuses, "b": lambda: [lambda: None]})
        assert found["a"] == {"error": "ValueError: no such shape"}
        assert "median" in found["b"]

    def test_one_that_takes_the_device_along_ends_the_stage(self, device, monkeypatch):
        monkeypatch.setattr(type(device), "answers", lambda self: False)

        def crashes() -> Any:
            raise RuntimeError("an illegal memory access")

        with pytest.raises(RuntimeError, match=r"a took the device along: .*illegal memory"):
            gpu("timing").compete(device, {"a": crashes})

    def test_warm_times_are_of_one_set(self, device):
        used: dict[int, int] = {0: 0, 1: 0}

        def call(index: int) -> Any:
            def run() -> None:
                used[index] += 1

            return run

        compete = gpu("timing").compete
        assert "warm" not in compete(device, {"a": lambda: [call(0), call(1)]})["a"]
        cold = dict(used)
        found = compete(device, {"a": lambda: [call(0), call(1)]}, warm=True)["a"]
        assert found["warm"]["q20"] <= found["warm"]["median"] <= found["warm"]["q80"]
        # The second set is used as often as without.
        assert used[1] == 2 * cold[1]
        assert used[0] >= 2 * cold[0] + device.plan.rounds

    def test_results_give_way_in_the_cache_only_when_warm(self):
        calls = gpu("calls")
        alive: list[int] = []

        class Result:
            count = 0

            def __init__(self) -> None:
                Result.count += 1
                alive.append(Result.count)

            def __del__(self) -> None:
                Result.count -= 1

        kept = calls.keeping([Result] * 3)()
        assert len(kept) == Result.count == 3
        del kept
        alive.clear()
        last = calls.repeating(Result)()
        assert last is not None
        assert alive == [1] * calls.REPEATS


class TestWorkingSet:
    """Twice the L2 cache of an H200, 60 MB, by inputs and results of a forward pass."""

    L2 = 60 * 2**20

    @pytest.fixture
    def device(self):
        cuda = gpu("cuda")
        found = cuda.GPU.__new__(cuda.GPU)
        found.properties = SimpleNamespace(L2_cache_size=self.L2)
        return found

    def test_every_timed_shape_is_beyond_the_cache(self, device):
        plan = device.plan
        assert plan is gpu("full_plan").FULL
        sizes = []
        for shape, dtype in plan.timed:
            item = gpu("patch_compare").number(dtype).itemsize
            tokens = shape.B * shape.N * shape.H * shape.d * item
            sizes += [4 * tokens, 2 * tokens]
        for problem, dtype in plan.embeddings:
            item = gpu("patch_compare").number(dtype).itemsize
            B, N, K, D = problem.problem
            sizes.append(B * N * (K + D * item))
        for size in sizes:
            # The set that is used next was used this many bytes ago.
            assert (device.copies(size) - 1) * size >= 2 * self.L2 or size > 2 * self.L2


class FakeGraphs:
    """PyTorch's captures as they end: one that fails leaves its stream and the generator behind."""

    def __init__(self, patch: Any) -> None:
        self.stream, self.capturing, self.captured = "main", False, 0
        cuda = gpu("cuda")
        for name, value in {
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "current_stream": lambda: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "synchronize": lambda: None,
            "graph": self.graph,
        }.items():
            patch.setattr(cuda.torch.cuda, name, value)
        patch.setattr(cuda, "_side_stream", nullcontext)
        zeros = cuda.torch.zeros
        patch.setattr(cuda.torch, "zeros", lambda *shape, device: zeros(*shape))

    @contextmanager
    def graph(self, graph: Any) -> Any:
        before, self.stream, self.capturing = self.stream, "capture", True
        yield
        self.stream, self.capturing, self.captured = before, False, self.captured + 1


class TestCapture:
    def test_one_that_fails_leaves_nothing_behind(self, monkeypatch):
        fake, cuda = FakeGraphs(monkeypatch), gpu("cuda")

        def synchronizes() -> None:
            if fake.capturing:
                raise RuntimeError("operation not permitted when stream is capturing")

        with pytest.raises(RuntimeError, match="not permitted"):
            cuda.GPU.__new__(cuda.GPU).capture(synchronizes)
        assert (fake.stream, fake.capturing) == ("main", False)

    def test_one_that_succeeds_is_the_only_one(self, monkeypatch):
        fake, cuda = FakeGraphs(monkeypatch), gpu("cuda")
        _, out = cuda.GPU.__new__(cuda.GPU).capture(lambda: "made")
        assert (out, fake.captured) == ("made", 1)


class Library:
    """NVML's functions, of a GPU with these clocks."""

    def __init__(self, *sm: int) -> None:
        self.sm = list(sm)
        self.asked: list[bytes] = []

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        self.asked.append(uuid)
        handle._obj.value = 7
        return 0

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int, value: Any) -> int:
        assert handle.value == 7
        # The library writes 32 bits.
        target = ctypes.cast(value, ctypes.POINTER(ctypes.c_uint))
        target[0] = self.sm.pop(0) if kind == 1 else 2619
        return 0

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int, value: Any) -> int:
        value._obj.value = 40
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: Any, value: Any) -> int:
        return 3  # not supported


class TestClocks:
    def test_are_read(self):
        library = Library(1980)
        clocks = gpu("clocks").Clocks("0123-45", library)
        assert clocks.read() == {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "celsius": 40.0}
        assert library.asked == [b"GPU-0123-45"]

    @pytest.mark.parametrize(("last", "steady"), [(1980, True), (1900, True), (1500, False)])
    def test_stand_beside_the_times(self, device, monkeypatch, tmp_path, last, steady):
        clocks = gpu("clocks").Clocks("0", Library(1980, last))
        monkeypatch.setattr(type(device), "clocks", lambda self: clocks.read())
        found = gpu("timing").compete(device, {"a": lambda: [lambda: None]})
        record = gpu("record").Record(tmp_path, "kernels", 1.0)
        record.add(what="core", dtype="bfloat16", mode="forward", contenders=found)
        (case,) = record.data["cases"]
        assert case["clocks"]["first"]["sm_mhz"] == 1980
        assert case["clocks"]["last"]["sm_mhz"] == last
        assert case["clocks"]["steady"] is steady
        text = gpu("summary_checks").clocks({"kernels": record.data})
        assert text.startswith(f"1 contests: {last} to 1980 MHz, 40 to 40 °C, read")
        assert ("| kernels core bfloat16 forward | 1980 | 1500 |" in text) is not steady

    def test_contests_of_models_have_names_of_their_own(self):
        plan, name = gpu("model_plan").FULL, gpu("summary_checks").contest
        assert len({name(contest._asdict()) for contest in plan}) == len(plan)

    def test_no_library_is_no_fault(self, device, tmp_path):
        cuda = gpu("cuda")
        real = cuda.GPU.__new__(cuda.GPU)
        real._clocks, real.properties = None, SimpleNamespace(uuid="0")
        assert real.clocks() == {}
        found = gpu("timing").compete(device, {"a": lambda: [lambda: None]})
        assert found.clocks == {}
        assert gpu("summary_checks").clocks({"kernels": {"cases": [{"clocks": {}}]}}) == ""


class TestStages:
    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (["gpsa"], ["ceilings", "kernels", "peers"]),
            (["patch_embed", "machine"], ["build", "machine", "ceilings", "patch_embed"]),
            (["conv_stem"], ["ceilings", "stem", "stem_choices"]),
            (["machine"], ["machine"]),
        ],
    )
    def test_bring_what_they_need(self, names, expected):
        assert [stage.name for stage in gpu("stages").chosen(names, dry=False)] == expected

    def test_all_run_without_a_name(self):
        """But the search, which would take all the time of a GPU."""
        stages = gpu("stages")
        assert stages.chosen(None, dry=True) == list(stages.STAGES)
        left_out = set(stages.STAGES) - set(stages.chosen(None, dry=False))
        assert [stage.name for stage in left_out] == ["tune"]


class TestRunTime:
    """Every stage takes all it may, until the driver ends it."""

    @pytest.fixture
    def clock(self, monkeypatch):
        driver = gpu("driver")
        clock = SimpleNamespace(now=0.0, written=[], limits=[])

        def finish(command: Any, env: Any, limit: float) -> tuple[None, str]:
            clock.now += limit
            clock.limits.append(limit)
            return None, "still going"

        def write(*args: Any, **kwargs: Any) -> None:
            clock.written.append(clock.now)

        monkeypatch.setattr(driver.time, "monotonic", lambda: clock.now)
        monkeypatch.setattr(driver, "_finish", finish)
        monkeypatch.setattr(driver.summary, "write", write)
        monkeypatch.setattr(driver.Package, "prepare", lambda self: None)
        return clock

    def test_ends_before_nine_minutes(self, clock, tmp_path):
        driver = gpu("driver")
        run = driver.Run(tmp_path, None, dry=False)
        assert run.run() == 1
        assert clock.now <= driver.BUDGET + driver.GRACE <= 540 - 20
        # The last tables come after the last stage.
        assert clock.written[-1] == clock.now
        records = gpu("record").read_all(tmp_path)
        assert {records[stage.name]["status"] for stage in run.stages} <= {"died", "not reached"}
        assert records["build"]["problems"] == ["timed out: still going"]

    def test_what_one_leaves_the_others_have(self, clock, tmp_path, monkeypatch):
        driver = gpu("driver")

        def quick(command: Any, env: Any, limit: float) -> tuple[int, str]:
            clock.now += 1.0
            clock.limits.append(limit)
            return 0, ""

        monkeypatch.setattr(driver, "_finish", quick)
        run = driver.Run(tmp_path, None, dry=False)
        run.run()
        shares = [stage.seconds for stage in run.stages]
        first = driver.BUDGET * shares[0] / sum(shares)
        assert clock.limits[0] == pytest.approx(first + driver.GRACE)
        second = (driver.BUDGET - 1) * shares[1] / sum(shares[1:])
        assert clock.limits[1] == pytest.approx(second + driver.GRACE)
        last = driver.BUDGET - (len(shares) - 1)
        assert clock.limits[-1] == pytest.approx(last + driver.GRACE)


class TestRecord:
    def test_is_on_disk_after_each_case_and_indented_in_the_end(self, tmp_path):
        """Indenting takes seconds of a stage, and is for those who read what is committed."""
        record = gpu("record").Record(tmp_path, "kernels", 1.0)
        path = tmp_path / "kernels.json"
        for count in (1, 2):
            record.add(name="case")
            text = path.read_text("utf-8")
            assert len(json.loads(text)["kernels"]["cases"]) == count
            assert text.count("\n") == 1
        assert record.close()
        assert path.read_text("utf-8").count("\n") > 10


class TestSanitizer:
    def test_a_tool_that_hangs_costs_only_itself(self, device, tmp_path, monkeypatch):
        """Though what it watches goes on and keeps its output open."""
        sanitizer = gpu("sanitizer")
        record = gpu("record").Record(tmp_path, "sanitizer", 100.0)
        monkeypatch.setattr(sanitizer, "_TOOLS", ("memcheck", "racecheck"))
        monkeypatch.setattr(sanitizer, "_prepare", lambda *_: [0])
        monkeypatch.setattr(type(record), "left", lambda self: 0.0)
        tools = {"memcheck": "sleep 8 & echo 'ran 0'; sleep 8", "racecheck": "echo 'ran 0'"}
        monkeypatch.setattr(type(device), "sanitizer", lambda _, tool: ["sh", "-c", tools[tool]])
        monkeypatch.setattr(sanitizer, "_LATE", 0.5)
        start = time.monotonic()
        sanitizer.run(device, record)
        assert time.monotonic() - start < 6
        assert record.data["missed"] == ["memcheck"]
        first, second = record.data["cases"]
        assert (first["outcome"], first["output"]) == ("not reached in time", "ran 0\n")
        assert second["calls"] == 1


class TestCeilings:
    @pytest.fixture
    def record(self, tmp_path):
        return lambda name, seconds: gpu("record").Record(tmp_path, name, seconds)

    def test_every_dtype_has_one_however_late(self, device, record):
        late = record("ceilings", -1.0)
        gpu("ceilings").run(device, late)
        late.close()
        assert late.data["missed"]
        assert len(late.data["ceilings"]["rates"]) == 4
        assert gpu("ceilings").read(record("kernels", 1.0)) == late.data["ceilings"]

    def test_what_fails_beside_them_costs_no_floors(self, device, record):
        ceilings = gpu("ceilings")
        done = record("ceilings", 100.0)
        ceilings.run(device, done)
        done.fail("no graph took a launch")
        done.close()
        assert ceilings.read(record("kernels", 1.0)) == done.data["ceilings"]

    def test_a_dtype_without_a_rate_leaves_none(self, device, record, monkeypatch):
        ceilings = gpu("ceilings")
        monkeypatch.setattr(ceilings, "_product", lambda *_: 0.0)
        done = record("ceilings", 100.0)
        ceilings.run(device, done)
        done.close()
        assert ceilings.read(record("kernels", 1.0)) is None


class TestLayouts:
    @pytest.mark.parametrize("mode", ["forward", "forward+backward"])
    def test_peers_of_the_stem_get_images_as_they_take_them(self, device, tmp_path, mode):
        """So that a change of the layout is in nobody's time."""
        problem = device.plan.stems_timed[0][0]
        record = gpu("record").Record(tmp_path, "stem", 100.0)
        contest = gpu("stem").Contest(device, record, problem, "bfloat16", mode)
        given = {}

        def note(name: str) -> Any:
            def hook(_: Any, images: tuple[torch.Tensor]) -> None:
                planar = images[0].is_contiguous()
                given.setdefault(name, set()).add("planar" if planar else "channels_last")

            return hook

        peers = {name: m for name, m in contest.eager().items() if name != "fastvit"}
        for name, module in peers.items():
            module.register_forward_pre_hook(note(name))
            contest._calls(module, 1)[0]()
        assert given.pop("eager") == {"planar"}
        assert given
        assert all(layouts == {"channels_last"} for layouts in given.values())


class TestUint8Chain:
    def test_normalises_in_one_tensor_of_half_precision(self, device):
        """More of them, or in float32, would be a slow peer."""
        problem = device.plan.embeddings[0][0]
        chain = gpu("patch_peers").Linear(device, problem, torch.bfloat16)
        images = gpu("patch_compare").images(device, problem, torch.uint8)
        made: list[torch.Tensor] = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
                out = func(*args, **(kwargs or {}))
                made.append(out)
                return out

        with Watch():
            chain.normalized(images)
        assert {x.dtype for x in made} == {torch.bfloat16}
        assert len({x.data_ptr() for x in made}) == 1
        exact = (images.double() / 255 - chain.mean) / chain.std
        assert (made[-1] - exact).abs().max() < 0.05
