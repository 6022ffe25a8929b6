"""Triton's interpreter at half its time, for kernels that run a few small programs each.

Most of its time goes into two things that change no result here. It patches `triton.language` anew for
every call of a device function, of which a program makes dozens; and it computes each integer twice, the
second time in 64 bits, to see whether 32 were enough, which they are for the sizes of tests.
"""

import dataclasses

from triton.runtime import interpreter

_patch_language = interpreter._patch_lang
_patched: set[int] = set()
"""The modules, by their namespaces, for whose functions the running launch has patched the language."""


def make_quick() -> None:
    """Makes the interpreter quick from now on, in this process."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _patch_language_once_a_launch


def _patch_language_once_a_launch(function):
    namespace = id(function.__globals__)
    if namespace in _patched:
        return interpreter._LangPatchScope()
    scope = _patch_language(function)
    if not _patched:
        # The launch's own scope: the interpreter takes its patches back when the launch ends.
        restore = scope.restore

        def end_of_launch():
            _patched.clear()
            restore()

        scope.restore = end_of_launch
    _patched.add(namespace)
    return scope
