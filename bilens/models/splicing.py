"""SAEs in place of what a hook point sees: SAELens' interface to a model with SAEs.

Nothing here needs SAELens itself: an SAE is a module with `encode`, `decode`, `cfg.metadata.hook_name` and hook points.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .hooks import HookedModel, Point

SAE: TypeAlias = nn.Module
_SAME = (  # other libraries' names of our hook points
    (re.compile(r"^(blocks\.\d+)\.mlp\.hook_in$"), r"\1.hook_mlp_in"),
    (re.compile(r"^(blocks\.\d+)\.mlp\.hook_out$"), r"\1.hook_mlp_out"),
)
_UNSCALED = ("expected_average_only_in", "covariance_whitening")  # what they divide by is not in the SAE


def own_name(hook: str | None) -> str | None:
    """Return the name that a hook point has here; other libraries have others for some."""
    for pattern, own in _SAME:
        hook = hook if hook is None else pattern.sub(own, hook)
    return hook


class Splice(nn.Module):
    """An SAE at work in a model: what it reads, and what it puts in place of what the model computes.

    Its hook points lie below that of the model, as SAELens has it: `blocks.2.hook_mlp_out.hook_sae_acts_post`.
    """

    def __init__(self, sae: SAE, use_error_term: bool, excluded: tuple[int, ...]):
        super().__init__()
        self.__dict__["sae"] = sae  # no part of the model: its weights are not the model's
        self.use_error_term, self.excluded = use_error_term, excluded
        for name, point in sae.hook_dict.items():
            setattr(self, name, point)
        self.hook_sae_error, self.hook_sae_output = Point(), Point()
        self.bypass: Tensor | None = None  # positions that it leaves alone
        self.seen: Tensor | None = None  # what a transcoder reads, which is not where it writes
        self.reads_elsewhere = False

    def forward(self, x: Tensor) -> Tensor:
        """Return what the SAE makes of the activation, or of what it has read before."""
        source = self.seen if self.reads_elsewhere else x
        if source is None:
            raise ValueError("a transcoder must have read its input before it writes: run the block it reads in too")
        made = self.sae.decode(self.sae.encode(source)).to(x)
        if self.use_error_term:
            made = made + self.hook_sae_error(self._error(source, x))
        if self.bypass is not None:
            made = torch.where(self.bypass.reshape(*self.bypass.shape, *[1] * (x.ndim - 2)), x, made)
        return self.hook_sae_output(made)

    @torch.no_grad()
    def _error(self, source: Tensor, x: Tensor) -> Tensor:
        """Return what the SAE gets wrong, whatever hooks do to its features."""
        hooks = [point._forward_hooks for point in self.sae.hook_dict.values()]
        try:
            for point in self.sae.hook_dict.values():
                point._forward_hooks = type(hooks[0])()
            return x - self.sae.decode(self.sae.encode(source)).to(x)
        finally:
            for point, kept in zip(self.sae.hook_dict.values(), hooks, strict=True):
                point._forward_hooks = kept

    def see(self, x: Tensor) -> Tensor:
        """Take note of what a transcoder reads."""
        self.seen = x
        return x


class Splicing(HookedModel):
    """A hooked model that SAEs can stand in: the methods are those of SAELens' `HookedSAETransformer`."""

    @property
    def acts_to_saes(self) -> dict[str, SAE]:
        """The SAEs that stand in the model, by the hook point they read."""
        return {name: splice.sae for name, (splice, _) in self._splices.items()}

    @property
    def _splices(self) -> dict[str, tuple[Splice, str]]:
        if "_spliced" not in self.__dict__:  # torch 2.6 compiles no `setdefault` of it
            self._spliced = {}
        return self._spliced

    def add_sae(
        self, sae: SAE, use_error_term: bool | None = None, exclude_special_tokens: bool | Sequence[int] = False
    ) -> None:
        """Let an SAE, or a transcoder, stand in the model until `reset_saes`, in place of one that reads there.

        From then on the hook point gives what the SAE makes of the activation, and its own hook points lie below:
        `blocks.2.hook_mlp_out.hook_sae_acts_post`. To steer, hook that one.

        Args:
            sae: An SAE of SAELens; `cfg.metadata.hook_name` says where it goes, of a transcoder `hook_name_out` where
                it writes.
            use_error_term: Add what the SAE gets wrong, so that the model computes what it did; the SAE's own setting
                if `None`.
            exclude_special_tokens: Leave BOS, EOS and padding as they are; or the token ids of a list.

        Raises:
            ValueError: No such hook point, an SAE that does not name one, or one whose normalisation is not in it.
        """
        at, to = self._places(sae)
        error = sae.use_error_term if use_error_term is None else use_error_term
        splice = Splice(sae, error, self._excluded(exclude_special_tokens))
        self._put(at, to, splice)

    def _put(self, at: str, to: str, splice: Splice) -> None:
        if at in self._splices:
            self._remove(at)
        for other, (_, where) in list(self._splices.items()):
            if where == to:  # one thing at a time is put in place of an activation
                self._remove(other)
        splice.reads_elsewhere = at != to
        if at != to:
            self.hook_dict[at].watched = (*self.hook_dict[at].watched, splice.see)
        point = self.hook_dict[to]
        point.__dict__["spliced"] = splice  # its hook points are the point's own, without a name between
        for name, below in splice.named_children():
            point.add_module(name, below)
        self._splices[at] = splice, to
        self.setup()

    def _remove(self, at: str) -> None:
        splice, to = self._splices.pop(at)
        point, source = self.hook_dict[to], self.hook_dict[at]
        source.watched = tuple(see for see in source.watched if see != splice.see)
        for name, _ in splice.named_children():
            delattr(point, name)
        del point.__dict__["spliced"]
        splice.sae.setup()  # its hook points get their own names back
        self.setup()

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Take SAEs out of the model, all if `None`, else those that read some hook points.

        Raises:
            ValueError: None reads there.
        """
        names = [act_names] if isinstance(act_names, str) else list(self._splices if act_names is None else act_names)
        for name in map(own_name, names):
            if name not in self._splices:
                there = ", ".join(self._splices) or "none"
                raise ValueError(f"act_names must be hook points that an SAE reads ({there}), got {name!r}")
            self._remove(name)

    @contextmanager
    def saes(
        self,
        saes: SAE | Sequence[SAE] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
    ) -> Iterator["Splicing"]:
        """Let SAEs stand in the model for the length of a `with` block; those that stood there before come back.

        Args:
            saes: One or several; the others are as for `add_sae`.
            reset_saes_end: Whether to take them out at the end, also after an exception.
            use_error_term: Add what the SAEs get wrong.
            exclude_special_tokens: Leave BOS, EOS and padding as they are.

        Raises:
            RuntimeError: Another thread has this model hooked, or SAEs in it.
        """
        with self.alone():
            before = dict(self._splices)
            try:
                for sae in [saes] if isinstance(saes, nn.Module) else saes:
                    self.add_sae(sae, use_error_term, exclude_special_tokens)
                yield self
            finally:
                if reset_saes_end:
                    self._restore(before)

    def _restore(self, before: dict[str, tuple[Splice, str]]) -> None:
        for name, pair in list(self._splices.items()):
            if before.get(name) is not pair:
                self._remove(name)
        for name, (splice, to) in before.items():
            if name not in self._splices:
                self._put(name, to, splice)

    def run_with_saes(self, *model_args: Any, saes: SAE | Sequence[SAE] = (), **kwargs: Any) -> Any:
        """Run the model with SAEs in it.

        Args:
            *model_args: As for `forward`.
            saes: One or several.
            **kwargs: As for `forward`, and `reset_saes_end`, `use_error_term`, `exclude_special_tokens` as for `saes`.
        """
        options, kwargs = _split(kwargs)
        with self.saes(saes, **options):
            return self(*model_args, **kwargs)

    def run_with_cache_with_saes(
        self, *model_args: Any, saes: SAE | Sequence[SAE] = (), **kwargs: Any
    ) -> tuple[Any, Any]:
        """Run the model with SAEs in it, and keep activations, the SAEs' too; arguments of `run_with_cache` and `saes`.

        The cache has the SAE's features at `blocks.2.hook_mlp_out.hook_sae_acts_post`, and what the model goes on with
        at `blocks.2.hook_mlp_out` itself.
        """
        options, kwargs = _split(kwargs)
        with self.saes(saes, **options):
            return self.run_with_cache(*model_args, **kwargs)

    def run_with_hooks_with_saes(self, *model_args: Any, saes: SAE | Sequence[SAE] = (), **kwargs: Any) -> Any:
        """Run the model with SAEs and hooks, on the SAEs' hook points too; arguments of `run_with_hooks` and `saes`."""
        options, kwargs = _split(kwargs)
        with self.saes(saes, **options):
            return self.run_with_hooks(*model_args, **kwargs)

    def notice(self, tokens: Int[Tensor, "batch seq"] | None) -> None:
        """Take note of the tokens that run next: SAEs leave some of them alone.

        Raises:
            ValueError: An SAE has to know them, and nobody does.
        """
        for splice, _ in self._splices.values():
            splice.seen = splice.bypass = None
            if splice.excluded:
                if tokens is None:
                    raise ValueError(
                        "exclude_special_tokens needs token ids: give those of the residual stream (tokens=)"
                    )
                excluded = torch.tensor(splice.excluded, device=self.W_E.device)
                splice.bypass = torch.isin(tokens.to(self.W_E.device), excluded)

    def _excluded(self, which: bool | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(which, bool):
            return tuple(map(int, which))
        if not which:
            return ()
        if self.tokenizer is None:
            raise ValueError("exclude_special_tokens must be a list of token ids for a model without a tokenizer")
        roles = (getattr(self.tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "sep"))
        return tuple(dict.fromkeys(index for index in roles if index is not None))

    def _places(self, sae: SAE) -> tuple[str, str]:
        """Return where an SAE reads and writes."""
        about = sae.cfg.metadata
        at = own_name(about.hook_name)
        if at is None:
            raise ValueError("sae must say where it goes (sae.cfg.metadata.hook_name), got one that does not")
        to = own_name(about.hook_name_out) or at
        for name in (at, to):
            self.check_hook_name(name)
        if sae.cfg.normalize_activations in _UNSCALED:
            raise ValueError(
                f"sae must say how it reads its input, got normalize_activations={sae.cfg.normalize_activations!r}, "
                f"which was never folded into its weights"
            )
        return at, to


def _split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part the arguments of `saes` from the others."""
    own = ("reset_saes_end", "use_error_term", "exclude_special_tokens")
    return {key: kwargs[key] for key in own if key in kwargs}, {k: v for k, v in kwargs.items() if k not in own}
