# SPDX-License-Identifier: Apache-2.0
"""The table of measured launch configurations: what a call takes of it, and what it may not do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit.functional import attention, gpsa_attention
from fastvit.ops import trust

pytest.importorskip("triton", reason="Triton is not installed")

from fastvit.kernels import configs
from fastvit.kernels import tuned as tables
from fastvit.kernels.configs import Config
from fastvit.kernels.tuned import Attention, Entry, Layer

from fastvit.ops import conv_stem_triton_backward, conv_stem_trust, gpsa_triton, gpsa_trust, tuned

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter stands for a GPU here"
)

MEASURED = {"gpu": "a GPU", "date": "2026-01-02", "fastvit": fastvit.__version__}
US = {"tuned": {}, "built-in": {}}
TILE = Config(rows=32, keys=(128, 64, 16), channels=(64,), warps=8)
CONVIT_S = Attention("gpsa", "forward", "half", 256, 9, 196, 48, (14, 14))

Write = Callable[..., Path]


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Write]:
    """``write((problem, kernels), ...)``: the user's table, of the interpreter's architecture."""
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "_SHIPPED", tmp_path / "shipped.json")
    tuned.forget()

    def write(
        *entries: Any,
        name: str = "tuned.json",
        arch: str = "sm_90",
        version: str = "",
        measured: dict[str, Any] = MEASURED,
    ) -> Path:
        plain = [tables.plain(problem, tuple(kernels.items()), US) for problem, kernels in entries]
        version = version or tuned.triton_version()
        tables.write(tmp_path / name, tables.merged({}, arch, version, measured, plain))
        tuned.forget()
        return tmp_path / name

    yield write
    tuned.forget()


def tile(config: Config = TILE) -> dict[str, Config]:
    return {"position_table": Config(), "forward_tile": config}


def taken(problem: Attention) -> dict[str, Config]:
    return tuned.attention(problem.direction, problem.posed("sm_90"))


def how() -> list[tuple[str, str]]:
    return [(choice.how, choice.entry) for choice in tuned.choices()]


def test_without_a_table_what_is_built_in_serves(write: Write) -> None:
    assert taken(CONVIT_S) == configs.forward(CONVIT_S.posed("sm_90"))
    assert how() == [("built-in", "")]


def test_an_exact_problem_takes_its_entry(write: Write) -> None:
    write((CONVIT_S, tile()))
    assert taken(CONVIT_S) == tile()
    assert how() == [("exact", CONVIT_S.name)]


def test_the_nearest_of_the_class_serves_within_reach(write: Write) -> None:
    small, other = CONVIT_S._replace(images=32), tile(TILE._replace(warps=4))
    write((CONVIT_S, tile()), (small, other))
    # 2304 heads are one doubling above 1152, 288 two below: to both sides the nearer.
    assert taken(CONVIT_S._replace(images=128)) == tile()
    assert taken(CONVIT_S._replace(images=48)) == other
    assert taken(CONVIT_S._replace(tokens=200, grid=(10, 20))) != tile()
    assert [choice[0] for choice in how()] == ["nearest", "nearest", "built-in"]
    # What is tuned for thousands of heads would leave a GPU idle at nine.
    assert taken(CONVIT_S._replace(images=1)) == configs.forward(
        CONVIT_S._replace(images=1).posed("sm_90")
    )


@pytest.mark.parametrize(
    "change",
    [
        {"arithmetic": "ieee"},
        {"direction": "backward"},
        {"channels": 64},
        {"channels": 40},
        {"tokens": 225, "grid": (15, 15)},
        {"op": "mhsa", "grid": None},
        {"op": "gpsa_dropout"},
    ],
    ids=str,
)
def test_another_class_takes_nothing(write: Write, change: dict[str, Any]) -> None:
    write((CONVIT_S, tile()))
    problem = CONVIT_S._replace(**change)
    assert taken(problem) == dict(problem.built_in("sm_90"))
    assert how()[0][0] == "built-in"


@pytest.mark.parametrize(
    "config",
    [
        TILE._replace(keys=(128, 64)),
        TILE._replace(channels=(32,)),
        TILE._replace(keys=64),
        TILE._replace(rows=0),
    ],
    ids=["keys", "channels", "one_number", "no_rows"],
)
def test_what_does_not_cover_the_problem_is_not_taken(write: Write, config: Config) -> None:
    write((CONVIT_S, tile(config)))
    assert taken(CONVIT_S) == configs.forward(CONVIT_S.posed("sm_90"))


def test_kernels_that_do_not_make_a_call_are_not_taken(write: Write) -> None:
    write((CONVIT_S, {"forward_tile": TILE}))
    assert taken(CONVIT_S) == configs.forward(CONVIT_S.posed("sm_90"))


def test_an_entry_without_kernels_says_that_nothing_is_faster(write: Write) -> None:
    write((CONVIT_S, {}), (CONVIT_S._replace(images=64), tile()))
    assert taken(CONVIT_S) == configs.forward(CONVIT_S.posed("sm_90"))
    assert how() == [("exact", CONVIT_S.name)]
    assert "exact, where those that are built in were not beaten" in str(fastvit.info())


def test_the_users_table_wins(write: Write) -> None:
    shipped = tile(TILE._replace(warps=4))
    write((CONVIT_S, shipped), name="shipped.json")
    assert taken(CONVIT_S) == shipped
    write((CONVIT_S, tile()))
    assert taken(CONVIT_S) == tile()
    # An exact entry of the package is nearer than another of the user's.
    problem = CONVIT_S._replace(images=128)
    write((problem, shipped), name="shipped.json")
    assert taken(problem) == shipped


@pytest.mark.parametrize("place", [{"arch": "sm_80"}, {"version": "1.0"}], ids=str)
def test_tables_are_of_an_architecture_and_a_version_of_triton(
    write: Write, place: dict[str, str]
) -> None:
    write((CONVIT_S, tile()), **place)
    assert taken(CONVIT_S) == configs.forward(CONVIT_S.posed("sm_90"))
    arch = place.get("arch", "sm_90")
    version = place.get("version", tuned.triton_version())
    assert tables.read(tuned.own_file(), arch, version).entries[0].problem == CONVIT_S


def test_how_images_are_split_follows_from_the_problem(write: Write) -> None:
    problem = CONVIT_S._replace(direction="backward")
    kernels = dict(problem.built_in("sm_90"))
    kernels["factor_gradient"] = kernels["factor_gradient"]._replace(channels=(4,))
    write((problem, kernels))
    few = problem._replace(images=64)
    own = configs.backward(few.posed("sm_90"))["factor_gradient"]
    assert taken(few)["factor_gradient"] == own._replace(channels=(4,))
    layer = Layer(
        "stem_weight_gradient", "backward", "half", 8, (56, 56), (96, 192), (2,), True, False
    )
    config = Config(rows=32, keys=(64,), channels=(64,), stages=2, taps=3, groups=1)
    fitted = layer.fitted("sm_90", ((layer.op, config),))
    # Two programs on each of 132 multiprocessors; 3 x 2 blocks of channels and 3 rows of taps.
    assert fitted == ((layer.op, config._replace(groups=264 // 18)),)


BROKEN = {
    "no_json": "{",
    "a_list": "[]",
    "no_object": '{"sm_90": 3}',
    "no_measured": '{"sm_90": {"VERSION": {"entries": []}}}',
    "no_gpu": '{"sm_90": {"VERSION": {"measured": {}, "entries": []}}}',
    "no_entries": '{"sm_90": {"VERSION": {"measured": MEASURED, "entries": 1}}}',
    "unknown_op": '{"sm_90": {"VERSION": {"measured": MEASURED, "entries": [{"op": "x"}]}}}',
    "odd_tile": '{"sm_90": {"VERSION": {"measured": MEASURED, "entries": [ENTRY]}}}',
    "no_end": "[" * 100_000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_left_out_with_a_reason(write: Write, name: str) -> None:
    entry = tables.plain(CONVIT_S, tuple(tile(TILE._replace(rows=48)).items()), US)
    text = BROKEN[name].replace("VERSION", tuned.triton_version())
    text = text.replace("MEASURED", json.dumps(MEASURED)).replace("ENTRY", json.dumps(entry))
    tuned.own_file().write_text(text, "utf-8")
    tuned.forget()
    assert taken(CONVIT_S) == configs.forward(CONVIT_S.posed("sm_90"))
    (file,) = tuned.files("sm_90")
    assert file.reason.startswith("not a table of configurations: ")
    assert f"{tuned.own_file()} is not read: {file.reason}" in str(fastvit.info())


SPLIT = dict(CONVIT_S._replace(direction="backward").built_in("sm_90"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", 10**400),
        ("images", 1e-320),
        ("tokens", 196.0),
        ("kernels", {"position_table": [], "forward_tile": {}}),
        ("warps", 4.0),
        ("warps", 3),
        ("stages", True),
        ("rows", 512),
        ("keys", [128, 64, 16, 0]),
        ("keys", [[128], 64, 16]),
        ("channels", "wide"),
        ("registers", "many"),
        ("registers", []),
        ("groups", {}),
        ("taps", [1]),
        ("resident", 1),
    ],
    ids=lambda x: f"{x!s:.20}",
)
def test_a_table_with_an_impossible_value_is_left_out(
    write: Write, field: str, value: object
) -> None:
    """None of them may raise in a forward, or reach Triton."""
    write((CONVIT_S, tile()))
    table = json.loads(tuned.own_file().read_text("utf-8"))
    (entry,) = table["sm_90"][tuned.triton_version()]["entries"]
    place = entry if field in entry else entry["kernels"]["forward_tile"]
    place[field] = value
    tuned.own_file().write_text(json.dumps(table), "utf-8")
    tuned.forget()
    assert taken(CONVIT_S) == configs.forward(CONVIT_S.posed("sm_90"))
    (file,) = tuned.files("sm_90")
    assert "entries[0]" in file.reason


def test_a_layer_that_there_is_not_is_told(write: Write) -> None:
    """It would never be taken."""
    (problem, kernels), *_ = stem_layers()
    write((problem._replace(direction="backward"), kernels))
    (file,) = tuned.files("sm_90")
    assert "no kernels for 'stem_conv' 'backward'" in file.reason


def test_groups_are_of_the_kernels_that_have_them(write: Write) -> None:
    """Of others a table may not say them, and where one does not, they are there all the same."""
    problem = CONVIT_S._replace(direction="backward")
    kernels = {name: config._replace(groups=0) for name, config in SPLIT.items()}
    kernels["backward_tile"] = kernels["backward_tile"]._replace(groups=7, warps=4)
    write((CONVIT_S, tile(TILE._replace(groups=1))), (problem, kernels))
    assert taken(CONVIT_S) == tile()
    found = taken(problem)
    assert found["factor_gradient"] == SPLIT["factor_gradient"]
    assert found["backward_tile"] == SPLIT["backward_tile"]._replace(warps=4)


def test_an_entry_of_as_many_heads_is_not_the_problems_own(write: Write) -> None:
    """128 images of 18 heads are not 256 of 9, nor 4 maps of 56 x 56 as many positions of 16."""
    alike, other = CONVIT_S._replace(images=128, heads=18), tile(TILE._replace(warps=4))
    write((alike, other), (CONVIT_S, tile()))
    assert taken(CONVIT_S) == tile()
    assert taken(CONVIT_S._replace(images=768, heads=3)) == other
    assert how() == [("exact", CONVIT_S.name), ("nearest", alike.name)]


def test_a_table_of_another_version_of_fastvit_is_left_out(write: Write) -> None:
    """Its configurations may spill in kernels that have changed; those of the package are checked
    when it is made.
    """
    old = {**MEASURED, "fastvit": "0.0.1"}
    write((CONVIT_S, tile()), measured=old)
    assert taken(CONVIT_S) == configs.forward(CONVIT_S.posed("sm_90"))
    assert "measured with fastvit 0.0.1; `fastvit tune` measures again" in str(fastvit.info())
    tuned.own_file().unlink()
    write((CONVIT_S, tile()), name="shipped.json", measured=old)
    assert taken(CONVIT_S) == tile()


def test_info_tells_the_files_and_what_calls_took(write: Write) -> None:
    write((CONVIT_S, tile()))
    taken(CONVIT_S)
    taken(CONVIT_S._replace(images=128))
    taken(CONVIT_S._replace(images=1))
    found = fastvit.info()
    text = str(found)
    own, version = tuned.own_file(), tuned.triton_version()
    assert f"{own}: 1 entries for sm_90 and Triton {version}, measured on a GPU, 2026-" in text
    assert f"  {CONVIT_S.name}: exact\n" in text
    assert f"B128 H9 14x14 d48: nearest, {CONVIT_S.name}\n" in text
    assert "B1 H9 14x14 d48: built-in" in text
    plain = json.loads(json.dumps(found.to_dict()))["tuned"]
    assert [choice["how"] for choice in plain["choices"]] == ["exact", "nearest", "built-in"]
    assert plain["choices"][0]["kernels"]["forward_tile"]["warps"] == 8
    assert plain["files"][0]["entries"] == 1


def test_merging_keeps_what_others_measured(tmp_path: Path) -> None:
    problems = [CONVIT_S, CONVIT_S._replace(images=64)]
    entries = [tables.plain(p, tuple(tile().items()), US) for p in problems]
    old = {"sm_80": {"3.6": {"measured": MEASURED, "entries": []}}}
    table = tables.merged(old, "sm_90", "3.9", MEASURED, entries)
    again = tables.plain(CONVIT_S, (), US)
    table = tables.merged(table, "sm_90", "3.9", {**MEASURED, "date": "2026-02-03"}, [again])
    found = table["sm_90"]["3.9"]
    assert [entry["kernels"] for entry in found["entries"]] == [{}, entries[1]["kernels"]]
    assert found["measured"]["date"] == "2026-02-03"
    assert table["sm_80"] == old["sm_80"]
    tables.write(tmp_path / "tuned.json", table)
    assert tables.read_all(tmp_path / "tuned.json") == table
    # What another card measured is not said to be this one's.
    table = tables.merged(table, "sm_90", "3.9", {**MEASURED, "gpu": "another"}, [again])
    assert table["sm_90"]["3.9"]["entries"] == [again]


def test_a_table_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "folder" / "tuned.json"
    entries = [tables.plain(CONVIT_S, tuple(tile().items()), US)]
    table = tables.merged({}, "sm_90", "3.9", MEASURED, entries)
    tables.write(file, table)
    assert tables.read(file, "sm_90", "3.9").entries == (Entry(CONVIT_S, tuple(tile().items())),)
    before = file.read_text("utf-8")

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        tables.write(file, {})
    assert file.read_text("utf-8") == before
    assert os.listdir(file.parent) == ["tuned.json"]


def test_the_table_of_the_package_can_be_read() -> None:
    file = Path(fastvit.__file__).parent / "kernels" / "tuned.json"
    for arch, versions in json.loads(file.read_text("utf-8")).items():
        assert arch in configs.ARCHITECTURES
        for version in versions:
            for problem, kernels in tables.read(file, arch, version).entries:
                assert not kernels or problem.fitted(arch, kernels), problem.name


GRID, TOKENS = (4, 5), 20


def leaves() -> list[Tensor]:
    shapes = [(2, 2, TOKENS, 16)] * 3 + [(2, 3), (2,)]
    return [torch.randn(s).to(torch.bfloat16).requires_grad_() for s in shapes]


def test_numbers_are_the_same_with_a_tuned_configuration(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPSA forward and backward in the interpreter, and that it is the tuned one that ran."""
    inputs = leaves()

    def run() -> list[Tensor]:
        out = gpsa_attention(*inputs, GRID, backend="triton")
        return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]

    expected = run()
    forward = Attention("gpsa", "forward", "half", 2, 2, TOKENS, 16, GRID)
    backward = forward._replace(direction="backward")
    stream = dict(backward._replace(tokens=300).built_in("sm_90"))
    stream["backward_query"] = stream["backward_query"]._replace(rows=16, keys=16)
    write((forward, tile(Config(rows=16, keys=(32,), channels=(16,)))), (backward, stream))
    seen: dict[str, Config] = {}
    for name in ("forward_tile", "backward_query"):
        launch = getattr(gpsa_triton, name)

        def launched(*args: Any, name: str = name, launch: Any = launch) -> None:
            seen[name] = args[-1]
            launch(*args)

        monkeypatch.setattr(gpsa_triton, name, launched)
    for x, y in zip(run(), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2 * y.abs().max().item())
    assert seen["forward_tile"] == Config(rows=16, keys=(32,), channels=(16,))
    assert (seen["backward_query"].rows, seen["backward_query"].keys) == (16, 16)


def test_plain_attention_takes_its_own_entries(write: Write) -> None:
    q, k, v = (torch.randn(2, 2, TOKENS, 16).to(torch.bfloat16) for _ in range(3))
    expected = attention(q, k, v, backend="triton")
    problem = Attention("mhsa", "forward", "half", 2, 2, TOKENS, 16, None)
    write((problem, {"forward_tile": Config(rows=16, keys=(16, 16), channels=(16,))}))
    found = attention(q, k, v, backend="triton")
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-2)
    assert how() == [("exact", problem.name)]


STEM = (3, 8, 16, 24)


def stem_layers() -> list[tuple[Layer, dict[str, Config]]]:
    """Of a stem of two convolutions in training, for two images of 17 x 13."""
    half = ("half", 2)
    conv = Layer("stem_conv", "forward", *half, (9, 7), (8, 16), (2,), True, False)
    back = Layer("stem_input_gradient", "backward", *half, (9, 7), (8, 16), (2,), True, False)
    weight = back._replace(op="stem_weight_gradient")
    last = weight._replace(size=(5, 4), channels=(16, 24), strides=())
    image = Layer("stem_image_gradient", "backward", *half, (17, 13), (3, 8), (2,), True, False)
    small = Config(rows=32, keys=(16,), channels=(16,))
    products = small._replace(taps=1, groups=1)
    return [
        (conv, {conv.op: small}),
        (back, {back.op: small._replace(groups=1)}),
        (weight, {weight.op: products}),
        (last, {last.op: products}),
        (image, {image.op: Config(rows=16, keys=(16,), groups=1)}),
    ]


def test_the_stem_takes_its_entries(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fastvit.ConvStem(3, STEM[1:3], (2, 2), STEM[3], backend="triton").bfloat16()
    x = torch.randn(2, 3, 17, 13).to(torch.bfloat16)

    def run() -> list[Tensor]:
        out = layer(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]

    expected = run()
    write(*stem_layers())
    seen = []
    for name in ("stem_input_gradient", "stem_weight_gradient", "stem_image_gradient"):
        launch = getattr(conv_stem_triton_backward, name)

        def launched(*args: Any, name: str = name, launch: Any = launch) -> Any:
            seen.append((name, args[-1]))
            return launch(*args)

        monkeypatch.setattr(conv_stem_triton_backward, name, launched)
    for x_, y in zip(run(), expected, strict=True):
        torch.testing.assert_close(x_, y, rtol=5e-2, atol=2e-2 * y.abs().max().item())
    exact = [choice.problem for choice in tuned.choices() if choice.how == "exact"]
    assert sorted(exact) == sorted(problem.name for problem, _ in stem_layers())
    rows = {(name, config.rows, config.warps) for name, config in seen}
    assert ("stem_image_gradient", 16, 4) in rows
    assert ("stem_weight_gradient", 32, 4) in rows


def test_a_tuned_configuration_proves_itself_by_the_same_check(write: Write) -> None:
    """The key has it, and the hash of the sources is not the table's."""
    q, code = torch.randn(2, 2, TOKENS, 16).to(torch.bfloat16), gpsa_trust.code()
    gpsa_trust.code.cache_clear()
    before = gpsa_trust._candidate("gpsa", "forward", gpsa_triton.plan("forward", q, GRID), q, GRID)
    problem = Attention("gpsa", "forward", "half", 2, 2, TOKENS, 16, GRID)
    write((problem, tile(Config(rows=16, keys=(32,), channels=(16,)))))
    plan = gpsa_triton.plan("forward", q, GRID)
    after = gpsa_trust._candidate("gpsa", "forward", plan, q, GRID)
    assert gpsa_trust.code() == code
    assert f"/{code}/" in after.key
    assert after.key != before.key
    assert "forward_tile(16,(32,),(16,)," in after.key
    assert all(result.ok for result in after.check())


def test_no_table_is_part_of_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every check would be made again when a table is merged."""
    names: set[str] = set()
    for module in (gpsa_trust, conv_stem_trust):
        monkeypatch.setattr(
            module, "source_hash", lambda *files: str(names.update(file.name for file in files))
        )
        module.code.__wrapped__()
    assert {"forward_tile.py", "stem_conv.py"} <= names
    assert not {name for name in names if name.startswith("tuned") or name.endswith(".json")}


def test_the_stems_backward_proves_itself_with_its_configurations(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    monkeypatch.setattr(trust, "needs_proof", lambda device: True)
    monkeypatch.setattr(
        trust, "trusts", lambda candidate, asked: bool(keys.append(candidate.key)) or True
    )
    layer = fastvit.ConvStem(3, STEM[1:3], (2, 2), STEM[3]).bfloat16()
    stages = [stage.conv.weight.detach() for stage in layer.stages]
    given = conv_stem_trust.Stages(stages, [], [], [], [], (2, 2))
    x, proj = torch.randn(2, 3, 17, 13), layer.projection.conv.weight.detach()
    assert conv_stem_trust.trusted_backward(x, proj, given, True, "auto") == ()
    write(*stem_layers())
    kernels = conv_stem_trust.trusted_backward(x, proj, given, True, "auto")
    assert kernels is not None
    assert [name for name, _ in kernels] == [
        "stem_image_gradient[0]", "stem_input_gradient[1]", "stem_weight_gradient[1]",
        "stem_weight_gradient[2]",
    ]  # fmt: skip
    assert "/sm_90/" in keys[0]
    assert "stem_image_gradient[0](16,(16,),(),4,1," in keys[1]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[str], None], list[tuple[str, str]]]:
    """``refuse(text)``: let kernels whose key has the text fail their check; and what was asked."""
    asked: list[tuple[str, str]] = []
    refused: list[str] = []

    def trusts(candidate: trust.Candidate, how: str) -> bool:
        asked.append((candidate.instead, how))
        if not any(text in candidate.key for text in refused):
            return True
        if how == "auto":
            return False
        raise RuntimeError("failed its check")

    monkeypatch.setattr(trust, "needs_proof", lambda device: True)
    monkeypatch.setattr(trust, "trusts", trusts)
    monkeypatch.setattr(trust, "is_known", lambda candidate: True)
    return refused.append, asked


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_what_is_built_in_serves_where_a_tuned_one_fails_its_check(
    write: Write, refuse: Any, backend: str
) -> None:
    """Not PyTorch, which is slower, and no error: there would be none without the table."""
    fails, asked = refuse
    q = torch.randn(2, 2, TOKENS, 16).to(torch.bfloat16)
    problem = Attention("gpsa", "forward", "half", 2, 2, TOKENS, 16, GRID)
    own = gpsa_trust.trusted_plan("forward", q, GRID, backend)
    assert own is not None
    assert len(asked) == 1
    write((problem, tile(Config(rows=16, keys=(32,), channels=(16,)))))
    tuned_plan = gpsa_trust.trusted_plan("forward", q, GRID, backend)
    assert tuned_plan is not None
    assert tuned_plan.kernels["forward_tile"].rows == 16
    trust.forget()
    asked.clear()
    fails("forward_tile(16,")
    for _ in range(2):
        assert gpsa_trust.trusted_plan("forward", q, GRID, backend) == own
    # Asked once each, and no second time.
    assert asked == [("what is built in", "auto"), ("the torch backend", backend)]
    fails("forward_tile(64,")
    trust.forget()
    if backend == "auto":
        assert gpsa_trust.trusted_plan("forward", q, GRID, backend) is None
    else:
        with pytest.raises(RuntimeError, match="failed its check"):
            gpsa_trust.trusted_plan("forward", q, GRID, backend)


def test_what_is_built_in_serves_where_a_tuned_stem_fails_its_check(
    write: Write, refuse: Any
) -> None:
    fails, asked = refuse
    layer = fastvit.ConvStem(3, STEM[1:3], (2, 2), STEM[3]).bfloat16()
    weights = [stage.conv.weight.detach() for stage in layer.stages]
    stages = conv_stem_trust.Stages(weights, [], [], [], [], (2, 2))
    x, proj = torch.randn(2, 3, 17, 13), layer.projection.conv.weight.detach()

    def plans() -> tuple[Any, Any]:
        return (
            conv_stem_trust.trusted_plan(x, proj, stages, True, True, "triton"),
            conv_stem_trust.trusted_backward(x, proj, stages, True, "triton"),
        )

    own = plans()
    assert own[1] == ()
    write(*stem_layers())
    tuned_plans = plans()
    assert tuned_plans[0] != own[0]
    assert len(tuned_plans[1]) == 4
    trust.forget()
    asked.clear()
    fails("stem_conv(32,(16,),")
    fails("stem_image_gradient[0](16,")
    assert plans() == own
    assert plans() == own
    assert [how for _, how in asked] == ["auto", "triton"] * 2


def test_a_tuned_one_that_could_not_be_checked_during_a_capture_is_checked_later(
    write: Write, refuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails, _ = refuse
    monkeypatch.setattr(gpsa_trust, "_settled", {})
    monkeypatch.setattr(
        trust, "is_known", lambda candidate: "forward_tile(16," not in candidate.key
    )
    q = torch.randn(2, 2, TOKENS, 16).to(torch.bfloat16)
    problem = Attention("gpsa", "forward", "half", 2, 2, TOKENS, 16, GRID)
    write((problem, tile(Config(rows=16, keys=(32,), channels=(16,)))))
    fails("forward_tile(16,")
    own = gpsa_trust.trusted_plan("forward", q, GRID, "auto")
    assert own == gpsa_triton.plan("forward", q, GRID, built_in=True)
    assert gpsa_trust._settled == {}
