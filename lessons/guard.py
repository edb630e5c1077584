"""What every answer is held to, whatever its tests ask. It leaves its arguments as they were (unless its docstring says "in place"), gives
something back, of the promised type, and lets a gradient through wherever the worked solution does (unless it says "no gradient")."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import operator
import re
import threading
import time
import types
import typing

import pytest
import torch
from torch import Tensor, nn

OFTEN = 2       # gradients are compared at the first calls of a test: two runs of each side are enough, and quick


@contextlib.contextmanager
def guarded(name: str, answer, solution, promise: str = ""):
    """`answer` with the guard around each call. `promise`: what the solution's docstring says. A class has its own methods back afterwards."""
    if inspect.isclass(solution) != inspect.isclass(answer) or not callable(answer):
        wanted = "a class" if inspect.isclass(solution) else "a function"
        pytest.fail(f"{name}: {wanted} is wanted, got {described(answer)}", pytrace=False)
    guard = Guard(name, may_change=bool(re.search(r"(?<!not )(?<!never )\bin[ -]place\b", promise, re.I)),
                  may_cut=bool(re.search(r"\bno gradient", promise, re.I)))
    if not inspect.isclass(answer):
        yield guard.around(answer, solution)
        return
    own, methods = dict(vars(answer)), {}
    for parent in reversed([parent for parent in answer.__mro__ if parent.__module__ == answer.__module__]):
        methods |= {key: method for key, method in vars(parent).items() if inspect.isfunction(method)}
    for key, method in methods.items():
        if key == "__init__":
            setattr(answer, key, guard.remember(method))
        elif key == "__call__" or key[0] != "_":
            setattr(answer, key, guard.around(method, getattr(solution, key, None), solution))
    try:
        yield answer
    finally:
        for key in methods:
            setattr(answer, key, own[key]) if key in own else delattr(answer, key)


class Guard:
    """The guard of one answer in one test."""

    def __init__(self, name: str, may_change: bool, may_cut: bool):
        self.name, self.may_change, self.may_cut = name, may_change, may_cut
        self.compared, self.made = 0, {}                 # made: {id of an instance: (the instance, copies of what its __init__ was given)}

    def remember(self, init):
        @functools.wraps(init)
        def remembering(instance, *args, **kwargs):
            with contextlib.suppress(Exception):         # what cannot be copied has no twin
                self.made.setdefault(id(instance), (instance, copy.deepcopy((args, kwargs))))
            try:
                return init(instance, *args, **kwargs)
            except Exception as error:
                raise with_what_was_given(error, name_arguments(init, (instance, *args), kwargs))

        return remembering

    def around(self, function, solution, owner=None):
        """`function`, watched. `owner`: the solution's class, where function is a method."""
        named = f"{self.name}.{function.__name__}" if owner else self.name

        @functools.wraps(function)
        def watched(*args, **kwargs):
            given = name_arguments(solution or function, args, kwargs)
            if owner:                                    # a method may change itself, and the objects it was made to work on
                given = {key: value for key, value in list(given.items())[1:] if isinstance(value, (Tensor, list, tuple, dict))}
            before = {} if self.may_change else aside(contents, given)
            replay = aside(self.twins, function, solution, owner, args, kwargs)
            began = time.monotonic()
            try:
                result = function(*args, **kwargs)
            except Exception as error:
                raise with_what_was_given(error, given)
            after = {} if self.may_change else aside(contents, given)
            changed = [path for path in before | after if before.get(path) != after.get(path)]
            if changed:
                pytest.fail(f"{named} changed its argument {changed[0]}: work on a copy", pytrace=False)
            if solution:
                must_fit(named, result, hints(solution).get("return", typing.Any))
            if replay and time.monotonic() - began < 0.5:              # what takes long is not run again
                aside(same_gradients, named, *replay)
            return result

        return watched

    def twins(self, function, solution, owner, args, kwargs):
        """Two calls to compare, the answer's and the solution's, each on its own copies of what is given; None where that asks for too much."""
        numbers = (int, float, bool, str, type(None))
        if solution is None or self.may_change or self.may_cut or self.compared >= OFTEN or hints(solution).get("return") in numbers:
            return None
        with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):
            theirs = args
            if owner:
                _, (init_args, init_kwargs) = self.made[id(args[0])]
                theirs = (twin(args[0], owner(*copy.deepcopy(init_args), **copy.deepcopy(init_kwargs))), *args[1:])
            names = [*inspect.signature(solution).parameters]          # theirs, so that both sides speak of the same
            mine, its = Call(function, args, kwargs, names), Call(solution, theirs, kwargs, names)
            self.compared += bool(mine.leaves)
            return (mine, its) if mine.leaves else None
        return None


def twin(layer: nn.Module, other: nn.Module) -> nn.Module:
    """`other` with copies of layer's parameters and buffers."""
    if not isinstance(layer, nn.Module) or [name for name, _ in layer.named_parameters()] != [name for name, _ in other.named_parameters()]:
        raise TypeError("the two cannot be compared")
    for mine, its in [*zip(layer.parameters(), other.parameters()), *zip(layer.buffers(), other.buffers(), strict=True)]:
        its.data = mine.detach().clone()
        its.requires_grad_(mine.requires_grad)
    return other.train(layer.training)


class Call:
    """A function and copies of its arguments. Each floating tensor in them, and each trained parameter, is a leaf that a gradient may reach."""

    def __init__(self, function, args, kwargs, names: list[str]):
        self.function, self.args, self.kwargs, self.names = function, args, kwargs, names
        self.random, self.leaves = torch.get_rng_state(), {}
        self.copies = self.copied(0.0)

    def copied(self, shift: float):
        """Copies of the arguments, each floating tensor moved by `shift` along some direction."""
        self.leaves = {}
        args = [self.copy(value, name, shift) for name, value in zip(self.names, self.args)]
        return args, {key: self.copy(value, key, shift) for key, value in self.kwargs.items()}

    def copy(self, value, path: str, shift: float):
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.device.type == "meta" or type(value) not in (Tensor, nn.Parameter):
                raise TypeError("no numbers to compare")
            leaf = self.leaves[path] = (value.detach() + shift * pattern(value)).requires_grad_()
            return leaf.clone()                          # not a leaf: it may be worked on in place
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)([self.copy(each, f"{path}[{i}]", shift) for i, each in enumerate(value)])
        if isinstance(value, dict):
            return {key: self.copy(each, f"{path}[{key!r}]", shift) for key, each in value.items()}
        if isinstance(value, nn.Module):
            if any(hooks for module in value.modules() for key, hooks in vars(module).items() if key.endswith("_hooks")):
                raise TypeError("a test is watching this module")
            value = copy.deepcopy(value)
            prefix = "" if path == "self" else f"{path}."
            self.leaves |= {prefix + name: p for name, p in value.named_parameters() if p.requires_grad and p.is_floating_point()}
            return value
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if callable(value) and not inspect.isclass(value):
            raise TypeError("a function may count its calls")
        return copy.deepcopy(value)

    def run(self, shift: float | None = None) -> list[Tensor]:
        """All the tensors that come back."""
        args, kwargs = self.copies if shift is None else self.copied(shift)
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
            torch.set_rng_state(self.random)
            return tensors(self.function(*args, **kwargs))

    def gradients(self, outputs: list[Tensor]) -> dict[str, Tensor | None]:
        whole = total(outputs)
        found = torch.autograd.grad(whole, [*self.leaves.values()], allow_unused=True) if whole.requires_grad else [None] * len(self.leaves)
        return dict(zip(self.leaves, found))


def same_gradients(name: str, mine: Call, its: Call) -> None:
    """Where the values agree, so must the gradients. Where they do not, the tests have more to say than we."""
    try:
        wanted = its.run()
    except Exception:
        return
    if not any(out.requires_grad for out in wanted):
        return
    carry = [i for i, out in enumerate(wanted) if out.requires_grad]
    try:
        got = mine.run()
        if not alike(got, wanted):
            return
        have = mine.gradients([got[i] for i in carry])
    except Exception as error:
        pytest.fail(f"{name} fails where a gradient is wanted: {type(error).__name__}: {error}", pytrace=False)
    want = its.gradients([wanted[i] for i in carry])
    largest = max([size(tensor) for tensor in [*want.values(), *wanted] if tensor is not None], default=0.0)
    for path in [path for path in want if path in have]:
        rounding = (1e-9 if want[path] is not None and want[path].dtype == torch.float64 else 1e-4) * largest
        if want[path] is None or not rounding < size(want[path]) < float("inf"):
            continue                                     # a gradient that is zero up to rounding: nothing is asked
        gone = have[path] is None or not have[path].any()
        off = 0.0 if gone else size(have[path] - want[path])
        if not gone and off <= max(rounding, 1e-6 * size(want[path])) or not alike_nearby(mine, its):
            continue
        if gone:
            pytest.fail(f"{name}: no gradient reaches {path}: is there a .detach(), .data, .item() or torch.no_grad() in the way?", pytrace=False)
        if want[path].dtype == torch.float64 and smooth(its, carry):
            pytest.fail(f"{name}: the value is right, but the gradient that reaches {path} is off by up to {off:.3g}: "
                        "is there a .detach(), .data, .item() or torch.no_grad() in the way of a part of it?", pytrace=False)


def alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-6, equal_nan=True) for a, b in zip(some, others))


def alike_nearby(mine: Call, its: Call) -> bool:
    """Do the two agree a little further too? Where every value is one, a wrong mean of them is right as well, and it is not the gradient that is wrong."""
    with torch.no_grad():
        try:
            wanted = its.run(0.05)
        except Exception:
            return True                                  # there is no further
        try:
            return alike(mine.run(0.05), wanted)
        except Exception:
            return False


def size(tensor: Tensor) -> float:
    return tensor.detach().abs().max().item() if tensor.numel() else 0.0


def total(outputs: list[Tensor]) -> Tensor:
    return sum((out * pattern(out)).sum() for out in outputs)


def pattern(like: Tensor) -> Tensor:
    """Some fixed numbers of this shape, no two alike."""
    return torch.cos(1.7 * torch.arange(like.numel(), dtype=torch.float64) + 0.3).view(like.shape).to(like)


def smooth(call: Call, carry: list[int]) -> bool:
    """Is there one slope, on both sides? At a tie or a corner two right answers may differ in their gradients."""
    with torch.no_grad():
        left, here, right = (float(total([out for i, out in enumerate(call.run(shift)) if i in carry])) for shift in (-1e-5, 0.0, 1e-5))
    return abs(left - 2 * here + right) < 1e-3 * abs(right - left)


def contents(value, path: str = "", found: dict | None = None) -> dict[str, object]:
    """{path: what is there}, to the bit. An object that is not known here counts as itself; a generator is there to be drawn from."""
    found = {} if found is None else found
    if isinstance(value, Tensor):
        if value.device.type != "meta" and value.layout == torch.strided and type(value) in (Tensor, nn.Parameter):
            bits = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            found[path] = (tuple(value.shape), value.dtype, value.requires_grad, bits)
    elif isinstance(value, nn.Module):
        for name, module in value.named_modules():
            found[f"{path}.{name}".rstrip(".")] = (id(module), module.training)
        for name, tensor in [*value.named_parameters(remove_duplicate=False), *value.named_buffers(remove_duplicate=False)]:
            contents(tensor, f"{path}.{name}", found)
    elif isinstance(value, (list, tuple)):
        found[path or "()"] = len(value)
        for i, each in enumerate(value):
            contents(each, f"{path}[{i}]", found)
    elif isinstance(value, dict):
        found[path or "()"] = list(map(repr, value))
        for key, each in value.items():
            contents(each, f"{path}[{key!r}]" if path else str(key), found)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            contents(getattr(value, field.name, None), f"{path}.{field.name}", found)
    elif isinstance(value, (int, float, str, bytes, bytearray, set, type(None))) or type(value).__module__ == "numpy":
        found[path] = repr(value)
    else:
        found[path] = id(value)
    return found


def tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else []
    return [tensor for part in parts for tensor in tensors(part)]


def must_fit(name: str, got, wanted) -> None:
    """Of the type that the signature promises: loosely, for any number is a float and a list may stand for a tuple."""
    origin, parts = typing.get_origin(wanted) or wanted, typing.get_args(wanted)
    if not isinstance(origin, type) or origin in (types.NoneType, types.UnionType):
        return                                           # nothing is promised, or too much to say
    if got is None:
        pytest.fail(f"{name} returned None: is the return missing?", pytrace=False)
    if origin is tuple and isinstance(got, (tuple, list)) and ... not in parts:
        if len(got) != len(parts):
            pytest.fail(f"{name}: {len(parts)} results are wanted, got {len(got)}", pytrace=False)
        for i, (each, part) in enumerate(zip(got, parts)):
            must_fit(f"{name}, result {i + 1} of {len(parts)}", each, part)
    elif not fits(got, origin):
        pytest.fail(f"{name}: {'an' if origin is int else 'a'} {origin.__name__} is wanted, got {described(got)}", pytrace=False)


def fits(got, wanted: type) -> bool:
    if wanted in (int, float):
        try:
            return not isinstance(got, str) and (operator.index if wanted is int else float)(got) is not None
        except (TypeError, ValueError, RuntimeError):
            return False
    return wanted is bool and hasattr(got, "__bool__") or isinstance(got, (tuple, list) if wanted in (tuple, list) else wanted)


def hints(function) -> dict:
    try:
        return typing.get_type_hints(function)
    except Exception:
        return {}


def described(value) -> str:
    """Type and, where it is short, value."""
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    if callable(value):
        return f"the {'class' if inspect.isclass(value) else 'function'} {getattr(value, '__name__', value)}"
    return type(value).__name__ + (f" {value!r}" if len(repr(value)) < 40 else "")


def name_arguments(function, args, kwargs) -> dict[str, object]:
    try:
        return dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {f"argument {i + 1}": value for i, value in enumerate(args)} | kwargs


def with_what_was_given(error: Exception, given: dict) -> Exception:
    """The shapes that were handed in, beside what torch says of shapes."""
    shapes = [f"{name} {tuple(value.shape)}" for name, value in given.items() if isinstance(value, Tensor)]
    if shapes and not getattr(error, "__notes__", []):
        error.add_note(f"it was given {', '.join(shapes)}")
    return error


def aside(function, *args):
    """function(*args) in a thread of its own: there, no mode or hook that a test has switched on sees what the guard does."""
    outcome = []

    def work():
        try:
            outcome.append((function(*args), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
