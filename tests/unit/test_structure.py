"""Files and functions of the package are short enough to be read at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "wanduet"
MAX_LINES = 400
MAX_PARAMETERS = 6
# Six have the parameters of diffusers or PyTorch, and of two commands each parameter is a flag.
MAX_WIDE_FUNCTIONS = 8


def sources() -> dict[str, str]:
    """The text of each file of the package, by its path in it."""
    return {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}


def wide_functions(source: str) -> Iterator[str]:
    """Names of functions with too many parameters, except Triton's kernels, which take each tensor's strides."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            own = [name for name in names if name not in ("self", "cls")]
            is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if len(own) > MAX_PARAMETERS and not is_kernel:
                yield node.name


def test_no_file_is_long() -> None:
    lengths = {name: len(text.splitlines()) for name, text in sources().items()}
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_few_functions_have_many_parameters() -> None:
    wide = [f"{name}: {function}" for name, text in sources().items() for function in wide_functions(text)]
    assert "doors/python/pipeline.py: __call__" in wide
    assert len(wide) <= MAX_WIDE_FUNCTIONS, wide


def test_which_functions_have_many_parameters() -> None:
    source = """
class A:
    def method_of_six(self, a, b, c, d, e, f): ...
    def method_of_seven(self, a, b, c, *, d, e, f, g): ...
    @classmethod
    async def made_of_seven(cls, a, b, c, d, e, f, /, g): ...

def six(a, b, c, d, e, f, *rest, **others): ...

@triton.jit(do_not_specialize=["length"])
def kernel(a, b, c, d, e, f, g): ...
"""
    assert list(wide_functions(source)) == ["method_of_seven", "made_of_seven"]
