"""Every solution with one small thing changed by machine: the tests of a lesson must reject each of these, or say why it is no mistake.

    python -m lessons.mutants [LESSON ...] [--sample 60/0]        (make mutants)

An operator looks at one node of the syntax tree and yields what might stand there instead. Mutants that do the same as the solution are
listed, with the reason, in the lesson's equivalent_mutants.py: EQUIVALENT = {(exercise, the changed line): reason}.
"""

import argparse
import ast
import copy
import difflib
import functools
import random
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LESSONS = Path(__file__).parent
OPERATORS = {}


def operator(*kinds: type):
    """Registers how nodes of these kinds are changed. An operator is given the node and the place it stands in."""

    def register(function):
        OPERATORS[function.__name__] = (kinds, function)
        return function

    return register


@dataclass(frozen=True)
class Place:
    """What an operator may want to know of the function around a node."""

    tensors: frozenset = frozenset()        # arguments annotated as Tensor
    whole: frozenset = frozenset()          # arguments annotated as int
    carries: bool = False                   # a gradient passes through this function, so that cutting it is a mistake


def expression(code: str, **parts: ast.expr) -> ast.expr:
    """The syntax tree of `code`, in which each name in `parts` stands for a tree."""

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node):
            return copy.deepcopy(parts.get(node.id, node))

    return Fill().visit(ast.parse(code, mode="eval").body)


def with_fields(node: ast.AST, **fields) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


# arithmetic

@operator(ast.BinOp, ast.AugAssign)
def floor_for_division(node, place):
    if isinstance(node.op, ast.Div):
        yield with_fields(node, op=ast.FloorDiv())
    if isinstance(node.op, ast.FloorDiv):
        yield with_fields(node, op=ast.Div())


@operator(ast.BinOp, ast.AugAssign)
def the_opposite_sign(node, place):
    opposite = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
    if type(node.op) in opposite:
        yield with_fields(node, op=opposite[type(node.op)]())


@operator(ast.BinOp)
def a_term_dropped(node, place):
    if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.FloorDiv, ast.Mod)):
        yield node.left
    if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
        yield node.right


@operator(ast.BinOp)
def a_factor_squared(node, place):
    if isinstance(node.op, (ast.Mult, ast.Div)):
        yield with_fields(node, left=expression("(a) ** 2", a=node.left))
        yield with_fields(node, right=expression("(a) ** 2", a=node.right))
    if isinstance(node.op, ast.Pow):
        yield with_fields(node, right=expression("a + 1", a=node.right))


@operator(ast.BinOp)
def sides_swapped(node, place):
    if isinstance(node.op, (ast.MatMult, ast.Sub, ast.Div, ast.Pow)):
        yield with_fields(node, left=node.right, right=node.left)


@operator(ast.UnaryOp)
def a_sign_or_a_not_dropped(node, place):
    if isinstance(node.op, (ast.USub, ast.Not)) and not isinstance(node.operand, ast.Constant):
        yield node.operand


# numbers and sizes

@operator(ast.Constant)
def off_by_one(node, place):
    if type(node.value) is int:
        yield ast.Constant(node.value + 1)
        if node.value > 0:
            yield ast.Constant(node.value - 1)


@operator(ast.Constant)
def another_number(node, place):
    if type(node.value) is float:
        yield ast.Constant(node.value * 2 if node.value else 1.0)


@operator(ast.Constant)
def true_for_false(node, place):
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)


@operator(ast.Slice)
def a_bound_moved(node, place):
    for name in ("lower", "upper"):
        bound = getattr(node, name)
        if bound is not None and not isinstance(bound, (ast.Constant, ast.UnaryOp)):
            yield with_fields(node, **{name: expression("a + 1", a=bound)})
            yield with_fields(node, **{name: expression("a - 1", a=bound)})


@operator(ast.Slice)
def a_bound_dropped(node, place):
    for name in ("lower", "upper", "step"):
        if getattr(node, name) is not None:
            yield with_fields(node, **{name: None})


@operator(ast.Call)
def a_range_too_short_or_too_long(node, place):
    if isinstance(node.func, ast.Name) and node.func.id == "range" and node.args:
        for code in ("a + 1", "a - 1"):
            last = -1 if len(node.args) < 3 else 1
            args = list(node.args)
            args[last] = expression(code, a=args[last])
            yield with_fields(node, args=args)


@operator(ast.Attribute, ast.Call, ast.Name, ast.Subscript)
def a_size_fixed(node, place):
    """At what it is when it is first asked for."""
    name = node.func if isinstance(node, ast.Call) else node
    sized = {ast.Attribute: lambda: name.attr in ("shape", "in_features", "out_features"), ast.Call: lambda: called(node) in ("len", "numel", "size", "element_size"),
             ast.Name: lambda: name.id in place.whole and isinstance(name.ctx, ast.Load), ast.Subscript: lambda: isinstance(node.value, ast.Attribute) and node.value.attr == "shape"}
    if sized[type(node)]():
        yield expression(f"_first('{node.lineno}:{node.col_offset}', a)", a=node)


# tensors

@operator(ast.Attribute, ast.Call)
def a_transpose_dropped(node, place):
    if isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("transpose", "t", "permute"):
        yield node.func.value


@operator(ast.Return, ast.Name, ast.Attribute)
def a_gradient_cut(node, place):
    if not place.carries:
        return
    if isinstance(node, ast.Name) and node.id in place.tensors and isinstance(node.ctx, ast.Load):
        yield expression("a.detach()", a=node)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr[0].isupper() and isinstance(node.ctx, ast.Load):
        yield expression("a.detach()", a=node)
    if isinstance(node, ast.Return) and node.value and not isinstance(node.value, ast.Constant):
        yield with_fields(node, value=expression("_cut(a)", a=node.value))


@operator(ast.BinOp)
def in_place(node, place):
    """On an argument: x * 2 becomes x.mul_(2), and the caller's x is spoilt."""
    method = {ast.Add: "add_", ast.Sub: "sub_", ast.Mult: "mul_", ast.Div: "div_"}.get(type(node.op))
    for here, there in ((node.left, node.right), (node.right, node.left)):
        if method and isinstance(here, ast.Name) and here.id in place.tensors and (here is node.left or method in ("add_", "mul_")):
            yield expression(f"a.{method}(b)", a=here, b=there)


SISTERS = {"sqrt": ["square"], "square": ["abs"], "log": ["log2", "log1p"], "exp": ["exp2"], "ceil": ["floor"], "floor": ["ceil"], "round": ["floor"], "softmax": ["log_softmax"],
           "log_softmax": ["softmax"], "triu": ["tril"], "tril": ["triu"], "zeros": ["ones"], "ones": ["zeros"], "any": ["all"], "all": ["any"], "min": ["max"], "max": ["min"],
           "amax": ["amin"], "amin": ["amax"], "argmax": ["argmin"], "argmin": ["argmax"], "mean": ["sum"], "sum": ["mean"], "std": ["var"], "rsqrt": ["sqrt"],
           "kaiming_uniform_": ["kaiming_normal_", "zeros_"], "zeros_": ["ones_"], "normal_": ["uniform_"], "norm": ["sum"], "sin": ["cos"], "cos": ["sin"],
           "cumsum": ["cumprod"], "zeros_like": ["ones_like"], "ones_like": ["zeros_like"], "randn": ["rand"], "rand": ["randn"], "argsort": ["sort"], "prod": ["sum"]}


@operator(ast.Attribute, ast.Name)
def a_sister_function(node, place):
    name = node.attr if isinstance(node, ast.Attribute) else node.id
    for sister in SISTERS.get(name, []):
        if isinstance(node, ast.Attribute):
            yield with_fields(node, attr=sister)
        elif name in ("min", "max", "any", "all"):
            yield ast.Name(sister, ast.Load())


@operator(ast.Call)
def a_method_call_dropped(node, place):
    """x.clone() becomes x, x.mean(-1) becomes x."""
    if isinstance(node.func, ast.Attribute) and node.func.attr not in ("__init__", "transpose", "t", "permute") and not is_module(node.func.value):
        yield node.func.value


@operator(ast.Call)
def a_wrapping_call_dropped(node, place):
    """list(x) becomes x."""
    wrapping = ("list", "tuple", "set", "dict", "sorted", "reversed", "abs", "round", "int", "float", "sqrt", "log", "exp", "Parameter", "ceil", "floor", "sum", "min", "max")
    if len(node.args) == 1 and called(node) in wrapping:
        yield node.args[0]


@operator(ast.Call)
def arguments_swapped(node, place):
    for i in range(len(node.args) - 1):
        args = list(node.args)
        args[i], args[i + 1] = args[i + 1], args[i]
        if called(node) not in ("transpose", "swapaxes"):              # there it is the same
            yield with_fields(node, args=args)


@operator(ast.Call)
def a_keyword_dropped(node, place):
    """keepdim=True, dtype=…, a=√5: the default is taken."""
    for keyword in node.keywords:
        if keyword.arg != "device":                      # the tests run on one
            yield with_fields(node, keywords=[other for other in node.keywords if other is not keyword])


@operator(ast.Tuple, ast.List)
def neighbours_swapped(node, place):
    if isinstance(node.ctx, ast.Load):
        for i in range(len(node.elts) - 1):
            elts = list(node.elts)
            elts[i], elts[i + 1] = elts[i + 1], elts[i]
            yield with_fields(node, elts=elts)


# conditions and flow

@operator(ast.Compare)
def a_comparison_flipped(node, place):
    flipped = {ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.GtE], ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt, ast.LtE], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq],
               ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is]}
    for other in flipped.get(type(node.ops[0]), []):
        yield with_fields(node, ops=[other(), *node.ops[1:]])


@operator(ast.BoolOp)
def and_for_or(node, place):
    yield with_fields(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    for value in node.values:
        rest = [other for other in node.values if other is not value]
        yield with_fields(node, values=rest) if len(rest) > 1 else rest[0]


@operator(ast.If, ast.IfExp, ast.While)
def a_branch_removed(node, place):
    yield with_fields(node, test=ast.Constant(False))
    if not isinstance(node, ast.While):
        yield with_fields(node, test=ast.Constant(True))


@operator(ast.comprehension)
def a_filter_dropped(node, place):
    if node.ifs:
        yield with_fields(node, ifs=[])


@operator(ast.comprehension, ast.For)
def only_the_first(node, place):
    yield with_fields(node, iter=expression("list(a)[:1]", a=node.iter))


@operator(ast.Expr, ast.AugAssign, ast.Assign)
def a_statement_dropped(node, place):
    """A call for its effect, an update, or a new value for an argument."""
    if isinstance(node, ast.Expr) and "__init__" not in ast.unparse(node):
        yield ast.Pass()
    if isinstance(node, ast.AugAssign) or isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in place.tensors | place.whole:
        yield ast.Pass()


@operator(ast.AugAssign)
def replaced_instead_of_added_to(node, place):
    yield ast.Assign([node.target], node.value)


@operator(ast.Break, ast.Continue)
def break_for_continue(node, place):
    yield ast.Continue() if isinstance(node, ast.Break) else ast.Break()


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def is_module(node: ast.expr) -> bool:
    """torch, nn.init, F …: what a function is taken from, not an object that has the method."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in ("torch", "nn", "F", "math", "ml", "random", "itertools", "copy", "np", "numpy", "functools", "dataclasses", "json", "ast") or (
        isinstance(node, ast.Call) and called(node) == "super")


# from operators to mutants

@dataclass(frozen=True)
class Mutant:
    lesson: str
    exercise: str
    operator: str
    was: str                                # the line as the solution has it
    line: str                               # and as the mutant has it
    source: str = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.exercise}: {self.operator}: {self.line}"

    def answer(self):
        return compiled(self)


@functools.lru_cache(maxsize=None)
def compiled(mutant: Mutant):
    """The mutant's function or class, one for all its tests: a size that is fixed stays fixed."""
    first = {}
    module = types.ModuleType(f"{mutant.lesson}.mutant")
    sys.modules[module.__name__] = module
    module.__dict__.update(_first=lambda key, value: first.setdefault(key, value), _cut=cut)
    exec(compile(mutant.source, f"<{mutant}>", "exec"), module.__dict__)
    return getattr(module, mutant.exercise)


def cut(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(cut, value))
    return value.detach() if hasattr(value, "detach") else value


@functools.cache
def mutants(folder: Path) -> list[Mutant]:
    """Every mutant of a lesson, each text once."""
    tree = ast.parse((folder / "solutions.py").read_text(encoding="utf-8"))
    texts, found, seen = [ast.unparse(top) for top in tree.body], {}, set()
    for i, top in enumerate(tree.body):
        if not isinstance(top, (ast.FunctionDef, ast.ClassDef)):
            continue
        exercise = owner(tree, top)
        for name, restore in changes(top):
            after = ast.unparse(top)
            restore()
            if after != texts[i] and (i, after) not in seen:
                seen.add((i, after))
                was, line = differing(texts[i].split("\n"), after.split("\n"))
                again = sum(key[0] == exercise and key[1].partition("  # place")[0] == line for key in found)
                line += f"  # place {again + 1}" * (again > 0)
                found[exercise, line] = Mutant(folder.name, exercise, name.replace("_", " "), was, line, "\n".join([*texts[:i], after, *texts[i + 1:]]))
    return list(found.values())


def owner(tree: ast.Module, node) -> str:
    """The exercise that a private helper belongs to: the first that names it."""
    if not node.name.startswith("_"):
        return node.name
    users = [top.name for top in tree.body if isinstance(top, (ast.FunctionDef, ast.ClassDef)) and not top.name.startswith("_")
             and any(isinstance(part, ast.Name) and part.id == node.name for part in ast.walk(top))]
    return users[0] if users else ""


def changes(top: ast.AST) -> Iterator:
    """Change one node after the other in place; each time (the operator's name, what undoes it)."""
    for parent, name, index, node, place in list(spots(top, Place())):
        for label, (kinds, function) in OPERATORS.items():
            if isinstance(node, kinds):
                for other in list(function(node, place)):
                    put(parent, name, index, other)
                    ast.fix_missing_locations(top)
                    yield label, functools.partial(put, parent, name, index, node)


def put(parent, name, index, node) -> None:
    if index is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[index] = node


def spots(parent: ast.AST, place: Place) -> Iterator:
    """(parent, field, index, node, place) of each node that is code: no annotation, docstring, decorator or message."""
    if isinstance(parent, ast.FunctionDef):
        kinds = {argument.arg: ast.unparse(argument.annotation) for argument in parent.args.args if argument.annotation}
        place = Place(frozenset(name for name, kind in kinds.items() if kind == "Tensor"), frozenset(name for name, kind in kinds.items() if kind == "int"),
                      "Tensor" in ast.unparse(parent.returns or parent) and not any("no_grad" in ast.unparse(decorator) for decorator in parent.decorator_list))
    for name, value in ast.iter_fields(parent):
        if name in ("annotation", "returns", "decorator_list", "args", "bases") and isinstance(parent, (ast.FunctionDef, ast.ClassDef, ast.AnnAssign)) or isinstance(parent, ast.Raise):
            continue
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            asked_of = isinstance(parent, ast.Attribute) and parent.attr in ("shape", "dtype", "device", "ndim") and isinstance(node, ast.Name)
            if isinstance(node, ast.AST) and not docstring and not asked_of:
                yield parent, name, index, node, place
                yield from spots(node, place)


def differing(before: list[str], after: list[str]) -> tuple[str, str]:
    """The first line that is not the same, in both."""
    for kind, i, j, k, l in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind != "equal":
            lines = (" ".join(map(str.strip, part)) or "(no line)" for part in (before[i:j], after[k:l]))
            return tuple(re.sub(r"_first\('[\d:]+', ", "_first(", line) for line in lines)
    return "", ""


def listed(folder: Path) -> dict[tuple[str, str], str]:
    """{(exercise, changed line): why this mutant is no mistake}"""
    path = folder / "equivalent_mutants.py"
    names = {}
    if path.exists():
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    return names.get("EQUIVALENT", {})


def mutants_asked_for(sample: str, folder: Path, exercise: str) -> list[Mutant]:
    """All of an exercise, or those of them that fell into the sample "COUNT/SEED" of its lesson."""
    return [mutant for mutant in sampled(sample, folder) if mutant.exercise == exercise]


@functools.cache
def sampled(sample: str, folder: Path) -> list[Mutant]:
    every = mutants(folder)
    if sample == "all":
        return every
    count, _, seed = sample.partition("/")
    return random.Random(f"{seed} {folder.name}").sample(every, min(int(count), len(every)))


class Tally:
    """A pytest plugin: which mutants were asked for, and which a test rejected."""

    def __init__(self):
        self.asked, self.killed = {}, set()

    def pytest_collection_modifyitems(self, items):
        for item in items:
            for value in getattr(getattr(item, "callspec", None), "params", {}).values():
                if isinstance(value, Mutant):
                    self.asked[str(value)] = value

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.killed.add(getattr(report, "judged", None))


def main() -> int:
    import pytest

    from lessons import exercises, surroundings_kept

    parser = argparse.ArgumentParser(prog="python -m lessons.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("lessons", nargs="*", help="folders in lessons/ (all)")
    parser.add_argument("--sample", default="all", metavar="COUNT/SEED", help="of each lesson's mutants, e.g. 20/0")
    options = parser.parse_args()
    bad = 0
    print(f"{'lesson':<20} {'mutants':>8} {'killed':>8} {'equivalent':>11} {'survived':>9}")
    for lesson in options.lessons or exercises():
        tally, folder = Tally(), LESSONS / Path(lesson).name
        with surroundings_kept():
            code = pytest.main(["-p", "no:terminal", "-p", "no:cacheprovider", "--answers=mutants", f"--mutants={options.sample}", f"--rootdir={LESSONS.parent}",
                                "-c", str(LESSONS.parent / "pyproject.toml"), str(folder / "test_exercises.py")], plugins=[tally])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            print(f"{folder.name}: pytest stopped ({code})")
            return 1
        reasons, alive = listed(folder), [mutant for name, mutant in tally.asked.items() if name not in tally.killed]
        survived = [mutant for mutant in alive if (mutant.exercise, mutant.line) not in reasons]
        print(f"{folder.name:<20} {len(tally.asked):>8} {len(tally.asked) - len(alive):>8} {len(alive) - len(survived):>11} {len(survived):>9}")
        for mutant in survived:
            print(f"  survived in {mutant.exercise} ({mutant.operator})\n    - {mutant.was}\n    + {mutant.line}")
        every = {(mutant.exercise, mutant.line) for mutant in mutants(folder)}
        rejected = {(mutant.exercise, mutant.line) for name, mutant in tally.asked.items() if name in tally.killed}
        stale = [(key, "is no mutant") for key in reasons.keys() - every] + [(key, "is rejected by a test") for key in reasons.keys() & rejected]
        for (exercise, line), why in stale:
            print(f"  listed as equivalent in {exercise}, but {why}: {line}")
        bad += len(survived) + len(stale)
    return int(bad > 0)


if __name__ == "__main__":
    from lessons.mutants import main as run        # the module that pytest imports, not this one under another name

    sys.exit(run())
