"""Triton's interpreter at a third of its time, for kernels that run a few small programs each.

Most of its time goes into Python objects that are made anew for every operation, equal every time.
It patches `triton.language` for every call of a device function, of which a program makes dozens.
It computes each integer twice, the second time in 64 bits, to see whether 32 were enough, as they are
in tests. And it derives shapes, types and constants again for every tensor. Here each of these is made
once and kept. No number that a kernel computes is another one.
"""

import dataclasses
import functools
import math

import triton.language as tl
from triton.runtime import interpreter

_patch_language = interpreter._patch_lang
_patched: set[int] = set()
"""The modules, by their namespaces, for whose functions the running launch has patched the language."""

_patches: dict[int, list] = {}
"""What to set in the language for a module's functions: (object, name, value)."""


def make_quick() -> None:
    """Makes the interpreter quick from now on, in this process."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _patch_language_once_a_launch
    interpreter._patch_attr = _patch_attribute
    interpreter._get_np_dtype = _remembered_by_name(interpreter._get_np_dtype)
    interpreter._validate_np_data_size = _validate_size
    tl.core.block_type.__init__ = _make_block_type
    tl.core.tensor.__init__ = _make_tensor
    # Of the interpreter alone: the compiler has a semantic of its own.
    semantic = interpreter.interpreter_semantic
    semantic.scalar_constant = _kept_constants(semantic.scalar_constant)
    semantic.binary_op_type_checking_impl = _of_equal_types_as_they_are(
        semantic.binary_op_type_checking_impl
    )


def _patch_language_once_a_launch(function):
    namespace = id(function.__globals__)
    scope = interpreter._LangPatchScope()
    if namespace in _patched:
        return scope
    if namespace in _patches:
        for patch in _patches[namespace]:
            scope.set_attr(*patch)
    else:
        scope = _patch_language(function)
        _patches[namespace] = [
            (owner, name, vars(owner)[name]) for owner, name, _ in scope._changes
        ]
    if not _patched:
        # The launch's own scope: the interpreter takes its patches back when the launch ends.
        restore = scope.restore

        def end_of_launch():
            _patched.clear()
            restore()

        scope.restore = end_of_launch
    _patched.add(namespace)
    return scope


def _patch_attribute(owner, name, member, builder, scope):
    semantic = interpreter.interpreter_semantic

    def interpreted(*args, _semantic=None, **keywords):
        return member(*args, **keywords, _semantic=semantic)

    scope.set_attr(owner, name, interpreted)


def _remembered_by_name(function):
    """A function of a type, whose name says all that it depends on."""
    known = {}

    def remembered(kind):
        name = kind.name
        if name not in known:
            known[name] = function(kind)
        return known[name]

    return remembered


@_remembered_by_name
def _most_bytes(kind) -> float:
    return math.inf if isinstance(kind, tl.pointer_type) else max(1, kind.primitive_bitwidth // 8)


def _validate_size(array, kind) -> bool:
    return array.itemsize <= _most_bytes(kind)


_make_block_type_anew = tl.core.block_type.__init__
_block_types: dict[tuple, dict] = {}
_scalar_shape = (tl.core.tuple([]), tl.constexpr(1))


def _make_block_type(self, element_ty, shape):
    key = (element_ty.name, *[getattr(side, "value", side) for side in shape])
    known = _block_types.get(key)
    if known is None:
        _make_block_type_anew(self, element_ty, shape)
        _block_types[key] = known = vars(self).copy()
        known["of_tensor"] = (
            tl.core.tuple([tl.constexpr(side) for side in self.shape]),
            tl.constexpr(self.numel),
        )
    vars(self).update(known)
    self.element_ty = element_ty


def _make_tensor(self, handle, type):
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    self.shape, self.numel = type.of_tensor if type.is_block() else _scalar_shape


def _kept_constants(scalar_constant):
    """No operation writes into its operands, so one tensor serves for every equal constant."""
    known = {}

    @functools.wraps(scalar_constant)
    def constant(value, dtype):
        key = (type(value), repr(value), dtype.name)  # 0.0 is equal to -0.0.
        if key not in known:
            known[key] = scalar_constant(value, dtype)
        return known[key]

    return constant


_COMPUTED_IN = {"fp32", "int32", "int64"}
"""Types in which the interpreter computes what two operands of that type have to make."""


def _of_equal_types_as_they_are(check):
    """Two tensors of one shape and of such a type need neither conversion nor broadcast."""

    @functools.wraps(check)
    def checked(lhs, rhs, *args, **keywords):
        if type(lhs) is tl.tensor and type(rhs) is tl.tensor:
            one, other = lhs.type, rhs.type
            if lhs.dtype.name in _COMPUTED_IN and str(one) == str(other):
                return lhs, rhs
        return check(lhs, rhs, *args, **keywords)

    return checked
