# SPDX-License-Identifier: Apache-2.0
"""What is built, published and installed, by the commands that users type.

Builds happen in a copy of the sources and install into environments of their own. Those see the
packages of this one through links, except fastvit, so that nothing large is fetched again; the
build requirements come from the package index, as for any user.
"""

from __future__ import annotations

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fastvit
from fastvit import _native

ROOT = Path(__file__).resolve().parents[1]
# As in CMakeLists.txt.
DEFAULT_ARCHS = ["80", "86", "89", "90a", "100a", "120"]
# Of CUDA code one architecture is built here; that all compile is seen in the installed package.
ONE_ARCH = {"FASTVIT_CUDA_ARCHS": "80"}


def run(*command, cwd, check=True, **variables):
    """Run a command in an environment that no setting of the caller's build leaks into."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FASTVIT_", "CMAKE_", "CUDA"))
        and name not in ("CC", "CXX", "MAX_JOBS", "PYTHONPATH", "PYTHONSAFEPATH")
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources without what earlier builds and runs left there."""
    left_over = (".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    return Path(
        shutil.copytree(
            ROOT,
            tmp_path_factory.mktemp("clone") / "fastvit",
            ignore=shutil.ignore_patterns(*left_over),
        )
    )


@pytest.fixture(scope="module")
def no_nvcc(tmp_path_factory):
    """Variables under which the build finds no nvcc, whatever this machine has."""
    return {"CUDA_HOME": str(tmp_path_factory.mktemp("no-cuda"))}


@pytest.fixture(scope="module")
def distributions(source, tmp_path_factory):
    """The sdist, and the wheel that is built out of it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, source, cwd=out, **ONE_ARCH)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with links to every installed package but fastvit."""
    base = tmp_path_factory.mktemp("environment")
    links = base / "links"
    links.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        # An editable fastvit consists of files whose names start otherwise.
        if "fastvit" not in entry.name.lower():
            (links / entry.name).symlink_to(entry)
    venv.create(base / "venv", with_pip=False, symlinks=True)
    (site,) = (base / "venv" / "lib").glob("python*/site-packages")
    (site / "links.pth").write_text(f"{links}\n")
    return base / "venv"


def pip(environment, *arguments, cwd, **options):
    """Run pip for ``environment``; verbosely, since it hides what a build prints."""
    python = environment / "bin" / "python"
    return run(
        *(sys.executable, "-m", "pip", "--python", python, *arguments, "-v"), cwd=cwd, **options
    )


def report(environment, cwd):
    """What the console script says from a folder."""
    done = run(environment / "bin" / "fastvit", "info", "--json", cwd=cwd)
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_the_sdist_holds_all_that_a_build_and_its_tests_need(distributions, source):
    with tarfile.open(distributions[0]) as archive:
        top = {name.split("/", 1)[0] for name in archive.getnames()}
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert top == {f"fastvit-{fastvit.__version__}"}
    needed = [
        source / name
        for name in ("CMakeLists.txt", "LICENSE", "setup.py", "Makefile", "mkdocs.yml")
    ]
    for folder in ("csrc", "docs", "fastvit", "kernels", "tests", "requirements"):
        needed += [p for p in (source / folder).rglob("*") if p.is_file()]
    missing = {str(path.relative_to(source)) for path in needed} - held
    assert not missing


def test_the_wheel_publishes_one_name_with_everything_under_it(distributions, source):
    with zipfile.ZipFile(distributions[1]) as archive:
        held = set(archive.namelist())
    record = f"fastvit-{fastvit.__version__}.dist-info"
    assert {name.split("/", 1)[0] for name in held} == {"fastvit", record}

    package = {str(p.relative_to(source)) for p in (source / "fastvit").rglob("*.py")}
    kernels = {f"fastvit/{p.relative_to(source)}" for p in (source / "kernels").rglob("*.py")}
    names = ("py.typed", "verified.json", "stem_choices.json", "benchmark/models.json")
    names += ("kernels/tuned.json",)
    data = {f"fastvit/{name}" for name in names}
    compiled = {name for name in held if re.fullmatch(r"fastvit/_C\.[^/]*\.so", name)}
    assert len(compiled) == 1
    published = {name for name in held if name.startswith("fastvit/")}
    assert published == package | kernels | data | compiled


def test_the_metadata_asks_for_torch_alone(distributions):
    with zipfile.ZipFile(distributions[1]) as archive:
        record = f"fastvit-{fastvit.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{record}/METADATA"))
        assert f"{record}/licenses/LICENSE" in archive.namelist()
        assert b"fastvit = fastvit.__main__:main" in archive.read(f"{record}/entry_points.txt")
    always = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert always == ["torch>=2.11"]
    assert set(metadata.get_all("Provides-Extra")) == {"bench", "docs", "examples", "test", "train"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


def test_the_module_links_system_libraries_only_and_exports_its_entry_only(distributions, tmp_path):
    with zipfile.ZipFile(distributions[1]) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".so"))
        module = archive.extract(member, tmp_path)
    dynamic = run("readelf", "--dynamic", "--wide", module, cwd=tmp_path).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[([a-z+_-]+)", dynamic))
    assert "libc" in needed
    assert needed <= {
        "libstdc++",
        "libm",
        "libgcc_s",
        "libc",
        "libpthread",
        "libdl",
        "librt",
        "ld-linux-x",
    }
    assert "RUNPATH" not in dynamic
    symbols = run("nm", "--dynamic", "--defined-only", module, cwd=tmp_path).stdout
    assert re.findall(r" T (\S+)", symbols) == ["PyInit__C"]


def test_a_second_install_in_place_works_and_needs_no_nvcc(source, environment, no_nvcc):
    """The cache of the first build names a ninja in an isolated environment that is gone."""
    first = pip(environment, "install", "--no-deps", ".", cwd=source, **no_nvcc)
    assert "fastvit: CPU code only, since no nvcc was found: CUDA_HOME=" in first.stdout
    (cache,) = (source / "build").rglob("CMakeCache.txt")
    (ninja,) = re.findall(r"^CMAKE_MAKE_PROGRAM:.*=(.*)$", cache.read_text(), re.MULTILINE)
    assert not Path(ninja).exists()

    second = pip(environment, "install", "--no-deps", ".", cwd=source, FASTVIT_CUDA="0", **no_nvcc)
    assert "fastvit: CPU code only (FASTVIT_CUDA=0)" in second.stdout

    # From the clone's root, where a `fastvit` folder without the compiled module lies.
    found = report(environment, cwd=source)
    assert Path(found["machine"]["package"]).is_relative_to(environment)
    assert found["build"]["version"] == fastvit.__version__
    assert found["build"]["nvcc"] is None
    assert found["cuda"]["compiled"] is False
    shadowed = run(environment / "bin" / "python", "-m", "fastvit", "info", cwd=source).stdout
    assert f"fastvit was imported from the checkout {source}, which holds no compiled" in shadowed


def test_an_editable_install_works_from_everywhere(source, environment, no_nvcc, tmp_path):
    pip(environment, "install", "--no-deps", "--editable", ".", cwd=source, **no_nvcc)

    assert len(list((source / "fastvit").glob("_C.*.so"))) == 1
    for folder in (source, tmp_path):
        found = report(environment, cwd=folder)
        assert Path(found["machine"]["package"]) == source / "fastvit"
        assert found["build"]["version"] == fastvit.__version__
    code = (
        "import importlib.util as u, fastvit.kernels as k;"
        "print(k.__file__, u.find_spec('kernels') is None)"
    )
    imported = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).stdout
    assert imported.split() == [str(source / "kernels" / "__init__.py"), "True"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        pytest.param(
            {"FASTVIT_CUDA": "1"},
            r"fastvit: FASTVIT_CUDA=1 needs the CUDA compiler nvcc, but CUDA_HOME=\S+ holds no "
            r"bin/nvcc\. Install the CUDA toolkit.* or set FASTVIT_CUDA=0",
            id="CUDA required without nvcc",
        ),
        pytest.param(
            {"FASTVIT_CUDA": "yes"},
            r"fastvit: FASTVIT_CUDA: expected auto, 0 or 1, got 'yes'",
            id="unknown choice",
        ),
        pytest.param(
            {"MAX_JOBS": "0"},
            r"fastvit: MAX_JOBS: expected a positive integer, got '0'",
            id="no jobs",
        ),
        pytest.param(
            {"PATH": "/nonexistent"},
            r"fastvit: a C\+\+17 compiler is needed and neither c\+\+, g\+\+ nor clang\+\+ is on "
            r"PATH\. Install one",
            id="no compiler",
        ),
    ],
)
def test_a_build_that_cannot_be_says_why(
    source, environment, no_nvcc, tmp_path, variables, message
):
    # Refused before any build requirement is used, so none is fetched.
    done = pip(
        environment,
        *("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source),
        cwd=tmp_path,
        check=False,
        **{**no_nvcc, **variables},
    )
    assert done.returncode != 0
    assert re.search(message, done.stdout), done.stdout
    assert "Traceback" not in done.stdout


def test_the_versions_of_package_metadata_and_module_agree():
    assert importlib.metadata.version("fastvit") == fastvit.__version__
    assert _native.load().build_info()["version"] == fastvit.__version__


def cuobjdump():
    """A program that lists the device code of a library: the toolkit's, or the one in Triton."""
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    triton = importlib.metadata.distribution("triton")
    return str(triton.locate_file("triton/backends/nvidia/bin/cuobjdump"))


def test_the_installed_module_holds_the_device_code_of_its_record(tmp_path):
    """Every architecture compiles: the record names them, the library holds each."""
    module = _native.load()
    build = module.build_info()
    if build["nvcc"] is None:
        assert (build["cuda_archs"], build["cuda_ptx"]) == ([], [])
        return
    listed = {
        kind: re.findall(
            r"\.sm_(\w+)\.",
            run(cuobjdump(), f"--list-{kind}", module.__file__, cwd=tmp_path).stdout,
        )
        for kind in ("elf", "ptx")
    }
    files = len(list((ROOT / "csrc").glob("*.cu")))
    assert sorted(listed["elf"]) == sorted(files * build["cuda_archs"])
    assert sorted(listed["ptx"]) == sorted(files * build["cuda_ptx"])
    if not build["cuda_archs_chosen"]:
        assert [*build["cuda_archs"], *build["cuda_archs_dropped"]] == DEFAULT_ARCHS
        assert build["cuda_ptx"] == ["80", "120"] or build["cuda_archs_dropped"]


def test_lint_runs_in_the_same_versions_before_a_commit_and_in_ci():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = dict(
        re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements/tested.txt").read_text(), re.M)
    )
    revisions = dict(re.findall(r"repo: \S+/(\S+)\n +rev: v(\S+)", hooks))
    assert revisions == {
        "ruff-pre-commit": pinned["ruff"],
        "mirrors-clang-format": pinned["clang-format"],
    }
