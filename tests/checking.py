"""The suite's shape checks at a fraction of their price: a call's arguments are checked once, and its result."""

import functools
import inspect

import jaxtyping
from jaxtyping import jaxtyped


def checked(function=None, *, typechecker):
    """Stand in for `jaxtyped`, which binds the signature of each call and checks its arguments a second time.

    In both, sizes that one call's annotations name alike must agree. Left to `jaxtyped`: classes, sizes named by the
    attributes of an argument (for these the signature must be bound), annotations that are strings (whose names may
    be defined for readers only), and generators (whose arguments are checked when they run, in the sizes of another
    call).
    """
    if function is None:
        return functools.partial(checked, typechecker=typechecker)
    if not _is_plain(function):
        return jaxtyped(function, typechecker=typechecker)
    typed = typechecker(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        with jaxtyped("context"):
            return typed(*args, **kwargs)

    return call


def _is_plain(function) -> bool:
    if not inspect.isfunction(function) or inspect.isgeneratorfunction(function):
        return False
    hints = function.__annotations__.values()
    return not any(isinstance(hint, str) or "{self." in getattr(hint, "dim_str", "") for hint in hints)
