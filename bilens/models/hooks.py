"""Hook points by name: which there are, what each sees, and running with them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from threading import current_thread, get_ident
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from .cache import Cache

NamesFilter: TypeAlias = str | Sequence[str] | Callable[[str], bool] | None

KEY_VALUE_HOOKS = (
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_k",
    "attn.hook_k_normalized",
)  # their heads are key-value heads
# Shape and meaning of each hook point, by its name within the block.
HOOK_MEANINGS = {
    "hook_embed": ("batch seq d_model", "token embeddings"),
    "ln_embed.hook_scale": ("batch seq 1", "root mean square of hook_embed"),
    "ln_embed.hook_normalized": ("batch seq d_model", "hook_embed / scale, before the norm's gain if it has one"),
    "hook_embed_normalized": ("batch seq d_model", "token embeddings after their norm, the start of the stream"),
    "hook_resid_pre": ("batch seq d_model", "residual stream that attention adds to, the stream's start mixed in"),
    "ln1.hook_scale": ("batch seq 1", "root mean square of resid_pre, what the norm divides by"),
    "ln1.hook_normalized": ("batch seq d_model", "resid_pre / scale, before the norm's gain if it has one"),
    "attn.hook_q": ("batch seq head d_head", "queries before rotation"),
    "attn.hook_k": ("batch seq head d_head", "keys before rotation"),
    "attn.hook_v": ("batch seq head d_head", "values"),
    "attn.hook_v_own": ("batch seq head d_head", "this block's values, before the first block's are mixed in"),
    "attn.hook_rot_q": ("batch seq head d_head", "queries after rotation by position"),
    "attn.hook_rot_k": ("batch seq head d_head", "keys after rotation by position"),
    "attn.hook_q2": ("batch seq head d_head", "second queries before rotation (of a pair)"),
    "attn.hook_k2": ("batch seq head d_head", "second keys before rotation (of a pair)"),
    "attn.hook_rot_q2": ("batch seq head d_head", "second queries after rotation (of a pair)"),
    "attn.hook_rot_k2": ("batch seq head d_head", "second keys after rotation (of a pair)"),
    "attn.q_norm.hook_scale": ("batch seq ...", "root mean square of hook_q: of each head, or of all as one"),
    "attn.q_norm.hook_normalized": ("batch seq ...", "hook_q / scale, before the norm's gain if it has one"),
    "attn.hook_q_normalized": ("batch seq head d_head", "queries after their norm, before rotation"),
    "attn.k_norm.hook_scale": ("batch seq ...", "root mean square of hook_k: of each head, or of all as one"),
    "attn.k_norm.hook_normalized": ("batch seq ...", "hook_k / scale, before the norm's gain if it has one"),
    "attn.hook_k_normalized": ("batch seq head d_head", "keys after their norm, before rotation"),
    "attn.q2_norm.hook_scale": ("batch seq ...", "root mean square of hook_q2: of each head, or of all as one"),
    "attn.q2_norm.hook_normalized": ("batch seq ...", "hook_q2 / scale, before the norm's gain if it has one"),
    "attn.hook_q2_normalized": ("batch seq head d_head", "second queries after their norm, before rotation"),
    "attn.k2_norm.hook_scale": ("batch seq ...", "root mean square of hook_k2: of each head, or of all as one"),
    "attn.k2_norm.hook_normalized": ("batch seq ...", "hook_k2 / scale, before the norm's gain if it has one"),
    "attn.hook_k2_normalized": ("batch seq head d_head", "second keys after their norm, before rotation"),
    "attn.hook_attn_scores": ("batch head query key", "scores: before a softmax, -inf where masked; else products"),
    "attn.hook_attn_scores2": ("batch head query key", "second scores before their softmax (differential attention)"),
    "attn.hook_pattern": ("batch head query key", "what multiplies the values"),
    "attn.hook_z": ("batch seq head d_head", "pattern-weighted sum of values"),
    "attn.hook_result": ("batch seq head d_model", "what each head adds to attention's output, scale included"),
    "ln1_post.hook_scale": ("batch seq 1", "root mean square of attention's output, if a norm follows it"),
    "ln1_post.hook_normalized": ("batch seq d_model", "attention's output / scale, before that norm's gain"),
    "hook_attn_out": ("batch seq d_model", "what attention adds to the residual stream, scale included"),
    "hook_resid_mid": ("batch seq d_model", "residual stream between attention and MLP"),
    "ln2.hook_scale": ("batch seq 1", "root mean square of resid_mid"),
    "ln2.hook_normalized": ("batch seq d_model", "resid_mid / scale, before the norm's gain if it has one"),
    "hook_mlp_in": ("batch seq d_model", "what enters the MLP, after the norm"),
    "mlp.hook_pre": ("batch seq hidden", "left factor, before its activation if the MLP is gated or plain"),
    "mlp.hook_pre_linear": ("batch seq hidden", "right factor"),
    "mlp.hook_post": ("batch seq hidden", "their product, what the down projection reads"),
    "ln2_post.hook_scale": ("batch seq 1", "root mean square of the MLP's output, if a norm follows it"),
    "ln2_post.hook_normalized": ("batch seq d_model", "the MLP's output / scale, before that norm's gain"),
    "hook_mlp_out": ("batch seq d_model", "what the MLP adds to the residual stream"),
    "hook_resid_post": ("batch seq d_model", "residual stream leaving the block"),
    "ln_final.hook_scale": ("batch seq 1", "root mean square of the last resid_post"),
    "ln_final.hook_normalized": ("batch seq d_model", "last resid_post / scale, what the unembedding reads"),
    "ln_final.hook_out": ("batch seq d_model", "the last norm's output, gain and shift included"),
    "unembed_out_before_cap": ("batch seq vocab", "logits before they are capped"),
}


class Point(HookPoint):
    """A hook point whose hooks may edit in place: they see a copy, so an edit changes what comes after and no more.

    Without a copy it would also change what shares the memory: the residual stream that another hook point has cached,
    the caller's own data, or what the backward pass needs. Hooks that only read, those of `run_with_cache`, see the
    activation itself.
    """

    spliced: Callable[[Tensor], Tensor] | None = None  # what is put in place of the activation: an SAE
    watched: tuple[Callable[[Tensor], Tensor], ...] = ()  # what reads it before: transcoders that write elsewhere

    @property
    def altered(self) -> bool:
        """Whether an SAE stands here, or reads here."""
        return self.spliced is not None or bool(self.watched)

    def add_hook(self, hook: Callable, *args: Any, **kwargs: Any) -> None:
        """Add a hook, as transformer_lens does, and remember whether it only reads; interrupted, it leaves none."""
        before = {id(handle) for handle in self.fwd_hooks}
        torchs = [(hooks, set(hooks)) for hooks in (self._forward_hooks, self._backward_hooks)]
        try:
            super().add_hook(hook, *args, **kwargs)
            for handle in self.fwd_hooks:
                if id(handle) not in before:
                    handle.only_reads = getattr(hook, "only_reads", False)
        except BaseException:
            for hooks, known in torchs:  # torch may know a hook already that transformer_lens does not yet
                for key in set(hooks) - known:
                    del hooks[key]
            raise

    def has_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
        level: int | None = None,
    ) -> bool:
        """Tell whether a hook stands here, as transformer_lens does, or one of torch's own, which are of no level."""
        if super().has_hooks(dir, including_permanent, level):
            return True
        if level is not None or not including_permanent:
            return False
        forward = dir != "bwd" and (self._forward_hooks or self._forward_pre_hooks)
        return bool(forward or (dir != "fwd" and (self._backward_hooks or self._backward_pre_hooks)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation, what an SAE makes of it if one stands here, or a copy for hooks that may edit it."""
        for see in self.watched:
            see(x)
        x = x if self.spliced is None else self.spliced(x)
        readers = sum(getattr(handle, "only_reads", False) for handle in self.fwd_hooks)
        return x.clone() if len(self._forward_hooks) > readers else x


class Hooked(HookedRootModule):
    """A module with transformer_lens' interface to hooks that refuses names which no hook point has.

    One module has one set of hooks, so threads that hook it at the same time would see each other's. While one has it
    hooked (`hooks`, `run_with_hooks`, `run_with_cache`, `generate` with hooks), another that hooks it or runs it is
    refused; hooks that `add_hook` left for good are every thread's. Give each thread a copy (`copy.deepcopy`), which
    has none of the hooks that a `with` block would have removed.
    """

    hooking: int | None = None  # the thread that is inside `hooks` with some
    levels: frozenset[int] = frozenset()  # of the `with` blocks that are open; generators may end in any order

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hooked":
        """Copy all but the hooks of `with` blocks, which end with the original's and would never end here."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(deepcopy(self.__dict__, memo))
        for level in made.levels:
            made._leave(level, True, False)
        return made

    @contextmanager
    def hooks(self, fwd_hooks=(), bwd_hooks=(), reset_hooks_end: bool = True, clear_contexts: bool = False):
        """Add hooks for the length of a `with` block; they are removed at its end, also after an exception.

        Args:
            fwd_hooks: Pairs of a hook name (or a predicate on names) and a function `f(activation, hook)`; what it
                returns replaces the activation, unless it is `None`.
            bwd_hooks: The same for gradients.
            reset_hooks_end: Whether to remove the hooks at the end.
            clear_contexts: Whether to clear the hook points' `ctx` too.

        Raises:
            ValueError: No hook point has that name.
            RuntimeError: Another thread has this model hooked.
        """
        self.check_thread()
        fwd_hooks, bwd_hooks = list(fwd_hooks), list(bwd_hooks)
        for name, _ in (*fwd_hooks, *bwd_hooks):
            self.check_hook_name(name)
        level = self.context_level + 1
        try:
            try:
                self.context_level, self.levels = level, self.levels | {level}
                if fwd_hooks or bwd_hooks:
                    self.hooking = get_ident()
                for direction, hooks in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
                    for name, hook in hooks:
                        self.add_hook(name, hook, dir=direction, level=level)
                yield self
            finally:
                self._leave(level, reset_hooks_end, clear_contexts)
        finally:  # again: an interrupt may have come while hooks were being removed
            self._leave(level, reset_hooks_end, clear_contexts)

    def _leave(self, level: int, reset: bool, clear_contexts: bool) -> None:
        if reset:
            self.reset_hooks(clear_contexts, level=level)
        self.levels -= {level}
        self.context_level = max(self.levels, default=0)
        if not self.levels:
            self.hooking = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep the model to this thread for the length of a `with` block: in another it refuses to run.

        Raises:
            RuntimeError: Another thread has this model hooked.
        """
        with self.hooks():
            self.hooking = get_ident()
            yield

    def check_thread(self) -> None:
        """Raise a RuntimeError if another thread has this model hooked."""
        if self.hooking is None or torch.compiler.is_compiling():  # a graph is traced for any thread
            return
        if self.hooking != get_ident():
            raise RuntimeError(
                f"this model is hooked by another thread (it is inside hooks, saes, run_with_hooks or run_with_cache "
                f"there), whose hooks would see this run: thread {current_thread().name!r} needs its own copy of the "
                f"model (copy.deepcopy)"
            )

    def get_caching_hooks(self, *args: Any, **kwargs: Any) -> tuple[dict, list, list]:
        """Return a cache and the hooks that fill it, as transformer_lens does; they are known to edit nothing."""
        cache, fwd_hooks, bwd_hooks = super().get_caching_hooks(*args, **kwargs)
        for _, hook in fwd_hooks:
            hook.only_reads = True
        return cache, fwd_hooks, bwd_hooks

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable, *args: Any, **kwargs: Any) -> None:
        """Add a hook that stays until `reset_hooks()`; see `hooks` for one that removes itself.

        Raises:
            ValueError: No hook point has that name.
        """
        self.check_hook_name(name)
        super().add_hook(name, hook, *args, **kwargs)

    def run_with_cache(
        self, *model_args: Any, names_filter: NamesFilter = None, return_cache_object: bool = True, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Run the model and keep the activations of the hook points that `names_filter` selects.

        Args:
            *model_args: As for `forward`.
            names_filter: A name, a list of names or a predicate; `None` keeps everything. Cost: keeping
                `attn.hook_result` makes attention write head by head, `[batch, seq, head, d_model]`.
            return_cache_object: Return transformer_lens' `ActivationCache` rather than a dict.
            **kwargs: As for `forward` (`attention_mask`, `stop_at_layer`, ...) and transformer_lens' `run_with_cache`
                (`remove_batch_dim`, `incl_bwd`, `device`, `pos_slice`).

        Returns:
            The model's output and the cache.

        Raises:
            ValueError: `names_filter` names no hook point.
        """
        if isinstance(names_filter, str):
            self.check_hook_name(names_filter)
        elif names_filter is not None and not callable(names_filter):
            names_filter = list(names_filter)
            for name in names_filter:
                self.check_hook_name(name)
        out, cache = super().run_with_cache(*model_args, names_filter=names_filter, **kwargs)
        if not return_cache_object:
            return out, cache
        return out, Cache(cache, self, has_batch_dim=not kwargs.get("remove_batch_dim", False))

    def check_hook_name(self, name: str | Callable[[str], bool]) -> None:
        """Raise a ValueError if no hook point has that name; predicates on names pass."""
        if callable(name) or name in self.hook_dict:
            return
        near = get_close_matches(name, self.hook_dict, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "model.hook_table() lists them"
        raise ValueError(f"no hook point is named {name!r}; {hint}")


class HookedModel(Hooked):
    """A transformer with hook points."""

    def hook_table(self) -> None:
        """Print every hook point with its shape and meaning; a block's are listed once, for all layers."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        axes = {name: getattr(self.cfg, name) for name in ("d_model", "d_head")}
        axes |= {"head": self.cfg.n_heads, "hidden": self.cfg.d_hidden}
        shared = axes | {"head": self.cfg.attention.n_key_value_heads}
        table = Table(box=box.SIMPLE, title=f"hook points; i = 0..{self.cfg.n_layers - 1}")
        for column in ("hook point", "shape", "meaning"):
            table.add_column(column, overflow="fold")
        for name, (shape, meaning) in HOOK_MEANINGS.items():
            if name in self.hook_dict or f"blocks.0.{name}" in self.hook_dict:
                sizes = shared if name in KEY_VALUE_HOOKS else axes
                sized = [f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in shape.split()]
                table.add_row(name if name in self.hook_dict else f"blocks.{{i}}.{name}", ", ".join(sized), meaning)
        Console(width=120).print(table)
