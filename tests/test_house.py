"""The rules of the house that a tool can check; CONTRIBUTING.md says why each is there."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import re
import shutil
import subprocess
import sys

import pytest

import polyvec as pv

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "polyvec"
MODULES = sorted(name for _, name, _ in pkgutil.iter_modules(pv.__path__) if name not in ("_core", "_cuda", "__main__"))
TORCH_MODULES = [f"torch.{path.stem}" for path in sorted((PACKAGE / "torch").glob("_[a-z]*.py"))]
MODULES = [*MODULES, *TORCH_MODULES] if importlib.util.find_spec("torch") else [m for m in MODULES if m != "torch"]
PUBLIC_MODULES = [name for name in MODULES if not (name.startswith("_") or name in TORCH_MODULES)]

# Layering


def includes(path):
    return re.findall(r'^#include\s+([<"][^>"]+[>"])', path.read_text(), re.MULTILINE)


def headers_of(folder):
    return {f'"{path.name}"' for path in (ROOT / folder).glob("*.hpp")}


STANDARD = r"<[a-z_]+>"
CPP_RULES = {  # folder -> what its files may include
    "cpp/include/polyvec": rf'{STANDARD}|"polyvec/\w+\.hpp"',
    "cpp/src": rf'{STANDARD}|<(cpuid|pthread|sched|unistd|sys/(mman|syscall))\.h>|"polyvec/\w+\.hpp"|"\w+\.hpp"',
    "cpp/kernels": r'<cstddef>|<cstdint>|<immintrin\.h>|<arm_neon\.h>|"\w+\.hpp"',
    "cpp/bindings": rf'{STANDARD}|<pybind11/\w+\.h>|"polyvec/\w+\.hpp"|"\w+\.hpp"',
}
OWN_HEADERS = {
    "cpp/src": headers_of("cpp/src") | {'"tables.hpp"'},
    "cpp/kernels": headers_of("cpp/kernels"),
    "cpp/bindings": headers_of("cpp/bindings"),
}


@pytest.mark.parametrize("folder", CPP_RULES)
def test_each_layer_of_cpp_includes_only_what_is_below_it(folder):
    files = sorted((ROOT / folder).glob("*.[ch]pp"))
    assert files
    for path in files:
        for name in includes(path):
            assert re.fullmatch(CPP_RULES[folder], name), f"{path.name} includes {name}"
            if re.fullmatch(r'"\w+\.hpp"', name):
                assert name in OWN_HEADERS[folder], f"{path.name} includes {name}"


def test_cuda_includes_the_ops_and_its_own_headers():
    own = r'"(\w+\.cuh|status\.hpp)"'
    allowed = rf'{STANDARD}|<cuda_runtime(_api)?\.h>|"polyvec/\w+\.hpp"|{own}'
    for path in sorted((ROOT / "cuda").glob("*.[ch]*")):
        for name in includes(path):
            binding = path.name == "module.cpp" and name in headers_of("cpp/bindings")
            assert binding or re.fullmatch(allowed, name), f"{path.name} includes {name}"


def imports(path):
    """Modules that a file of the package imports at its top level: (name, names)."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, tuple(alias.name for alias in node.names)


def imported_siblings(path):
    for module, names in imports(path):
        if module == "polyvec":
            yield from names
        elif module.startswith("polyvec."):
            yield module.partition(".")[2]


ENGINES = sorted(
    path.stem for path in (ROOT / "cpp" / "bindings").glob("*.hpp") if (PACKAGE / f"{path.stem}.py").exists()
)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_import_private_modules_only(engine):
    assert not [name for name in imported_siblings(PACKAGE / f"{engine}.py") if not name.startswith("_")]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_torch_is_imported_where_it_is_needed_only(path):
    assert not {name.partition(".")[0] for name, _ in imports(path)} & {"torch", "cupy"}
    assert "torch" not in {name.partition(".")[0] for name in imported_siblings(path)}


@pytest.mark.parametrize("path", sorted((PACKAGE / "torch").glob("*.py")), ids=lambda path: path.stem)
def test_the_torch_package_uses_public_functions_and_its_own_modules(path):
    assert not [name for name in imported_siblings(path) if name.startswith("_")]


# Compiled objects

OBJECTS = sorted(ROOT.glob("build*/**/polyvec_kernels_*.dir/**/*.o"))


@pytest.mark.skipif(not (OBJECTS and shutil.which("nm")), reason="needs nm and a build folder with kernel objects")
def test_kernel_objects_define_nothing_that_the_linker_could_mix_up():
    """A weak or global function compiled for AVX-512 could become the copy that every level, and every CPU, calls."""
    for path in OBJECTS:
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        for line in listing.splitlines():
            kind, name = re.fullmatch(r"\S+ (\S) (.*)", line).groups()
            if kind.isupper() or kind in "wvu":
                isa = re.search(r"polyvec_kernels_(\w+)\.dir", str(path))[1]
                assert kind in "RD", f"{path}: {line}"
                assert re.fullmatch(rf"polyvec::{isa}::(\w+_kernels|table)", name), f"{path}: {line}"


def test_no_flag_changes_floating_point_for_the_process():
    for path in ROOT.glob("c*/CMakeLists.txt"):
        code = re.sub(r"#.*", "", path.read_text())
        assert not re.search(r"-ffast-math|-Ofast|-march=native|use_fast_math", code)


# Source texts


def sources(*folders):
    suffixes = {".cpp", ".hpp", ".cu", ".cuh", ".py", ".pyi", ".txt", ".toml", ".yaml", ".yml"}
    for folder in folders:
        yield from (p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in suffixes and "data" not in p.parts)


def test_sources_are_ascii():
    for path in sources("cpp", "cuda", "python", "scripts"):
        assert path.read_text(encoding="utf-8").isascii(), path


def test_the_library_uses_no_iostreams():
    """Where the C++ library is linked into the module, a locale of another copy in the process can crash them."""
    for path in sources("cpp", "cuda"):
        assert not re.search(r"#include <(io|i|o|s|f)stream>", path.read_text()), path


def test_the_library_never_prints_or_aborts():
    words = r"\b(printf|fprintf|puts|std::cout|std::cerr|std::clog|abort|std::exit|_exit|terminate|assert)\b\s*[(<;]"
    for path in sources("cpp", "cuda"):
        if "on_host" in path.parts:  # for tests only
            continue
        assert not re.search(words, re.sub(r"//.*", "", path.read_text())), path
    for path in PACKAGE.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert path.name == "__main__.py" or "print" not in {getattr(call, "id", "") for call in calls}, path


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pybind11_stubgen", "ruff"))), reason="needs the extra `dev`"
)
def test_the_stub_is_up_to_date():
    command = [sys.executable, ROOT / "scripts" / "make_stubs", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_hooks_and_the_extra_dev_pin_the_same_tools():
    hooks = set(re.findall(r"([\w-]+==[\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text()))
    pinned = set(re.findall(r'"([\w-]+==[\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    tools = {pin for pin in pinned if pin.partition("==")[0] in {hook.partition("==")[0] for hook in hooks}}
    assert tools <= hooks
    assert {pin.partition("==")[0] for pin in tools} == {"ruff", "mypy", "clang-format", "codespell"}


# The public interface

PUBLIC = {
    "polyvec": [
        "BlockSparse",
        "CudaError",
        "FormatError",
        "Ragged",
        "__version__",
        "fde",
        "get_num_threads",
        "hnsw",
        "hypercomplex",
        "maxsim",
        "num_threads",
        "quantize",
        "retrieve",
        "runtime_info",
        "scan",
        "set_num_threads",
    ],
    "polyvec.fde": ["Encoder", "carve"],
    "polyvec.hnsw": ["Index", "knn_graph"],
    "polyvec.hypercomplex": ["conjugate", "flow_keys", "flow_query", "norm", "normalize", "product", "relation_query"],
    "polyvec.maxsim": [
        "CertifiedTopk",
        "PackedTokens",
        "align",
        "certified_topk",
        "from_residuals",
        "pack",
        "pool",
        "score",
        "score_matrix",
        "score_pairs",
        "topk",
    ],
    "polyvec.quantize": [
        "CertifiedResult",
        "KMeansResult",
        "KMeansSelection",
        "KMeansSetsResult",
        "PackedCodes",
        "ProductQuantizer",
        "RaBitQ",
        "Refined",
        "RefinedCodes",
        "ResidualQuantizer",
        "ScalarQuantizer",
        "kmeans",
        "kmeans_select",
        "kmeans_sets",
        "vq_linear",
    ],
    "polyvec.retrieve": ["LinkPredictor", "MultiVectorIndex"],
    "polyvec.scan": ["hinge", "logsumexp", "nearest", "rank", "score_pairs", "topk"],
    "polyvec.torch": [
        "Assignment",
        "CodebookUsage",
        "MaxSimDistillationLoss",
        "MaxSimLoss",
        "RelationScorer",
        "ResidualVectorQuantizer",
        "VectorQuantizer",
        "codebook_usage",
        "logsumexp",
        "maxsim",
        "maxsim_pairs",
        "normalize",
        "pool",
        "product",
        "relation_query",
        "score_pairs",
        "soft_assign",
        "vq_assign",
        "vq_linear",
    ],
}


def test_public_names():
    """A name that is added or removed here is a line of CHANGELOG.md, too."""
    names = {"polyvec": sorted(pv.__all__)}
    for module in PUBLIC_MODULES:
        names[f"polyvec.{module}"] = sorted(importlib.import_module(f"polyvec.{module}").__all__)
    assert names == {name: PUBLIC[name] for name in PUBLIC if name != "polyvec.torch" or "torch" in MODULES}


def public_callables():
    """(name, function) of every public function and method, inherited ones too, of the engines and pipelines."""
    for module in PUBLIC_MODULES:
        for name in PUBLIC[f"polyvec.{module}"]:
            value = getattr(importlib.import_module(f"polyvec.{module}"), name)
            if inspect.isfunction(value):
                yield f"{module}.{name}", value
            elif inspect.isclass(value):
                yield f"{module}.{name}", value
                for attribute in dir(value):
                    function = getattr(getattr(value, attribute), "__func__", getattr(value, attribute))
                    ours = inspect.isfunction(function) and function.__module__.startswith("polyvec.")
                    if ours and not attribute.startswith("_"):
                        yield f"{module}.{name}.{attribute}", function


CALLABLES = dict(public_callables())
SECTIONS = ["Parameters", "Attributes", "Returns", "Yields", "Raises", "Notes", "References", "Examples"]
POSITIONAL_OPTIONS = {"ids", "lengths", "dtype", "negatives", "tail_ids", "k"}  # optional data; pack(docs, "float32")


def parameters_of(value):
    return [p for p in inspect.signature(value).parameters.values() if p.name not in ("self", "cls")]


def sections_of(value):
    """The sections of a numpydoc docstring: {title: text}."""
    parts = re.split(r"^(\w+)\n-{3,}\n", inspect.getdoc(value), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", CALLABLES)
def test_docstrings_have_their_sections(name):
    value = CALLABLES[name]
    sections = sections_of(value)
    assert list(sections) == [title for title in SECTIONS if title in sections], "sections stand in numpydoc's order"
    documented = re.findall(r"^([*\w][\w, *]*?)(?: :.*)?$", sections.get("Parameters", ""), re.MULTILINE)
    assert [n.strip() for line in documented for n in line.split(",")] == [p.name for p in parameters_of(value)]
    if inspect.isfunction(value) and value.__annotations__["return"] not in ("None", "Self"):
        assert "Returns" in sections
    if name.count(".") == 1:
        assert "Examples" in sections


@pytest.mark.parametrize("name", CALLABLES)
def test_options_are_keywords(name):
    for p in parameters_of(CALLABLES[name]):
        data = p.default is p.empty or p.name in POSITIONAL_OPTIONS
        assert p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and data), p.name
        if p.name == "num_threads":
            assert (p.kind, p.default) == (p.KEYWORD_ONLY, None)


@pytest.mark.parametrize("module", ["", *MODULES])
def test_examples_of_docstrings_run(module):
    module = importlib.import_module(f"polyvec.{module}".rstrip("."))
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


PAGES_EXAMPLES = {
    f"{page}, example {number}": code
    for page in ("README.md", "docs/guide.md")
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL), 1
    )
}


@pytest.mark.parametrize("name", PAGES_EXAMPLES)
def test_examples_of_pages_run(name, tmp_path, monkeypatch):
    code = PAGES_EXAMPLES[name]
    if "import torch" in code:
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {})
