"""An attribution as a graph that other tools read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bilens.circuits.attribution import Attribution
from bilens.circuits.traces import Trace
from bilens.models.sources import read_json
from bilens.tensor.keeping import atomic_write, user_path

LIST = "graph-metadata.json"
FEATURE = "cross layer transcoder"  # what the format calls a node that is a feature


@dataclass(frozen=True)
class _Nodes:
    """Nodes by id, and links between them, of one graph."""

    nodes: dict[str, dict[str, Any]]
    links: list[dict[str, Any]]
    length: int

    def add(self, row: int | str, index: int, number: int, position: int, kind: str, clerp: str, **more: Any) -> str:
        """Add a node unless it is there, and return its id.

        Viewers want (row, number, position) to be unique, and read integers off the id: the row, the index in it, the
        position.
        """
        key = f"{row}_{index}_{position}"
        node = {"node_id": key, "feature": number, "layer": str(row), "ctx_idx": position, "feature_type": kind}
        node |= {"jsNodeId": f"{row}_{index}-{position}", "clerp": clerp, "run_idx": 0}
        node |= {"reverse_ctx_idx": self.length - 1 - position, "is_target_logit": False, "token_prob": 0.0}
        self.nodes.setdefault(key, node | {"influence": None, "activation": None} | more)
        return key

    def link(self, source: str, target: str, weight: float) -> None:
        """Add a link unless it carries nothing."""
        if weight != 0:
            self.links.append({"source": source, "target": target, "weight": weight})


def graph(
    attribution: Attribution,
    *,
    row: int = 0,
    pairs: int = 20,
    traced: Trace | None = None,
    slug: str = "bilens",
    scan: str = "bilens",
) -> dict[str, Any]:
    """Return one text's attribution as an attribution graph that circuit-tracer and Neuronpedia read.

    Nodes are input features, pairs of them, the target, and what is left: error, bias, the sum of the weaker pairs. A
    pair's link to the target weighs its term, and each of its two legs half of it, so what goes in comes out. A
    feature's own link to the target is its linear term. The links into the target sum to `attribution.total`. With
    `traced`, links from embedding, heads and earlier MLPs sum to each feature's pre-activation.

    The format is schema version 1 (`metadata`, `qParams`, `nodes`, `links`) with `layer` a row of the drawing: four
    rows to a layer l, heads in `4l`, input features in `4l + 1`, pairs in `4l + 2`, the MLP's output in `4l + 3`.
    `feature` is circuit-tracer's pairing of row and feature; of other nodes it is a number that tells them apart. A
    token's node is a logit with the probability that the model gives it as the next token at that position.
    `influence` is the share of all weight that nodes of at least this weight carry together, so that a threshold keeps
    the strongest.

    Args:
        attribution: What `attribute` returned, at one or several positions of the text.
        row: Which text, if there were several.
        pairs: How many pairs per position get a node.
        traced: Where the features came from: `trace(sources(...), inp, attribution.features)`.
        slug: Name of the graph.
        scan: Name of the model.

    Raises:
        ValueError: No position of that text, fewer than 0 pairs, or a trace of other features.
    """
    places = attribution.places
    here = (places.row == row).nonzero().flatten().tolist()
    if not here:
        raise ValueError(f"row must be a text of the attribution, from 0 to {len(places.texts) - 1}, got {row}")
    if pairs < 0:
        raise ValueError(f"pairs must not be negative, got {pairs}")
    if traced is not None:
        traced.check(attribution)
    drawn = _Nodes({}, [], len(places.words[row]))
    ends = [_draw_position(drawn, attribution, n, pairs, traced) for n in here]
    _set_influence(drawn, ends)
    metadata = {"slug": slug, "scan": scan, "transcoder_list": [], "prompt_tokens": list(places.words[row])}
    description = f"{attribution.target.name}, layer {attribution.layer}: exact terms of a bilinear MLP"
    metadata |= {"prompt": places.texts[row], "schema_version": 1}
    metadata |= {"info": {"description": description, "generator": {"name": "bilens"}}}
    state = {"pinnedIds": ends, "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": state, "nodes": list(drawn.nodes.values()), "links": drawn.links}


def write_graph(attribution: Attribution, path: str | Path, **options: Any) -> None:
    """Write `graph(attribution, **options)` as JSON; its slug is the file's name unless given.

    The graph is listed in the `graph-metadata.json` beside it, from which circuit-tracer's page learns which graphs a
    folder holds: `circuit_tracer.frontend.local_server.serve(folder)` shows them.

    Args:
        attribution: What `attribute` returned.
        path: Where to.
        **options: As for `graph`.

    Raises:
        ValueError: As for `graph`; or there is a `graph-metadata.json` that is no list of graphs.
    """
    path = user_path(path)
    drawn = graph(attribution, **{"slug": path.stem, **options})
    listed = _listed(path.with_name(LIST), drawn["metadata"])
    for where, what in ((path, drawn), (path.with_name(LIST), listed)):
        with atomic_write(where) as partial:
            partial.write_text(json.dumps(what, indent=1, allow_nan=False), encoding="utf-8")


def _listed(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the list of a folder's graphs with one more, in place of an earlier one of that slug."""
    known = read_json(path) if path.exists() else {"graphs": []}
    graphs = known.get("graphs")
    if not isinstance(graphs, list) or not all(isinstance(one, dict) for one in graphs):
        raise ValueError(f"{path} must hold a list of graphs, got {graphs!r}")
    return known | {"graphs": [*(one for one in graphs if one.get("slug") != metadata["slug"]), metadata]}


def _draw_position(drawn: _Nodes, found: Attribution, n: int, n_pairs: int, traced: Trace | None) -> str:
    """Add what happens at one position, and return the id of the target's node."""
    position, low = found.places.position[n].item(), 4 * found.layer + 1
    end = _draw_target(drawn, found, n)
    bias = drawn.add(low, -2, -2, position, "bias", "biases")
    error = drawn.add(low, -1, -1, position, "mlp reconstruction error", "what the input SAE does not reconstruct")
    parts = [bias, error]
    for feature, z in zip(found.features[n].tolist(), found.activations[n].tolist(), strict=True):
        if feature >= 0:
            number, clerp = _pairing(low, feature), found.label(feature)
            parts.append(drawn.add(low, feature, number, position, FEATURE, clerp, activation=z))
    table = found.table[n, : len(parts), : len(parts)]
    for part, weight in zip(parts, table[0].tolist(), strict=True):
        drawn.link(part, end, weight)
    _draw_pairs(drawn, found, table[1:, 1:], parts[1:], position, n_pairs, end)
    if traced is not None:
        _draw_sources(drawn, found, traced, n, parts)
    return end


def _draw_target(drawn: _Nodes, found: Attribution, n: int) -> str:
    target, row = found.target, 4 * found.layer + 3
    position, value = found.places.position[n].item(), found.pre_activation[n].item()
    if target.kind == "token":
        chance = found.probability[n].item()
        more = {"is_target_logit": True, "activation": value, "token_prob": chance}
        clerp = f'Output "{target.word}" (p={chance:.3f})'  # which circuit-tracer's page takes apart
        return drawn.add(row, target.index, target.index, position, "logit", clerp, **more)
    if target.kind == "direction":
        return drawn.add(row, 0, 0, position, "direction", target.name, activation=value)
    number = _pairing(row, target.index)
    return drawn.add(row, target.index, number, position, FEATURE, target.name, activation=value)


def _draw_pairs(
    drawn: _Nodes, found: Attribution, table: Tensor, parts: list[str], position: int, n_pairs: int, end: str
) -> None:
    """Add the strongest pairs among error and features, and one node for all others."""
    row, base = 4 * found.layer + 2, found.n_features + 1  # the error counts as one more feature
    order = table.abs().flatten().argsort(descending=True, stable=True)
    strongest = order[: min(n_pairs, int((table != 0).sum()))]
    for flat, value in zip(strongest.tolist(), table.flatten()[strongest].tolist(), strict=True):
        legs = [parts[i] for i in divmod(flat, len(parts))]
        clerp = " × ".join(drawn.nodes[leg]["clerp"] for leg in legs)
        left, right = (int(leg.split("_")[1]) for leg in legs)
        number = left % base * base + right % base
        pair = drawn.add(row, number, number, position, "feature pair", clerp, activation=value)
        for leg in dict.fromkeys(legs):
            drawn.link(leg, pair, value / len(set(legs)))
        drawn.link(pair, end, value)
    others = table.flatten()[order[len(strongest) :]].sum().item()
    if others:
        drawn.link(drawn.add(row, -1, -1, position, "feature pair", "all weaker pairs"), end, others)


def _draw_sources(drawn: _Nodes, found: Attribution, traced: Trace, n: int, parts: list[str]) -> None:
    """Add the sources of the features at one position, and the encoder's offset from the bias node."""
    position = found.places.position[n].item()
    row = found.places.row[n].item()
    vocab, word = found.places.windows.tokens[row, position].item(), found.places.word(n)
    keys = []
    for name in traced.names:
        kind, _, at = name.partition(" ")
        if kind == "embedding":
            keys.append(drawn.add("E", vocab, position, position, "embedding", f"embedding of {word!r}"))
        elif kind == "MLP":
            keys.append(drawn.add(4 * int(at) + 3, -1, -1, position, "mlp", name))
        elif kind == "attention":
            keys.append(drawn.add("E", -1, -1, position, "bias", name))
        else:
            block, head = map(int, at.split("."))
            keys.append(drawn.add(4 * block, head, head, position, "attention head", name))
    for i, feature in enumerate(parts[2:]):
        for key, weight in zip(keys, traced.values[n, i].tolist(), strict=True):
            drawn.link(key, feature, weight)
        drawn.link(parts[0], feature, traced.bias[n, i].item())


def _pairing(x: int, y: int) -> int:
    """Return Cantor's number of a pair of natural numbers."""
    return (x + y) * (x + y + 1) // 2 + y


def _set_influence(drawn: _Nodes, ends: Sequence[str]) -> None:
    """Give each node the share of the total weight that nodes at least as strong carry together; the targets none."""
    weight = dict.fromkeys(drawn.nodes, 0.0)
    for link in drawn.links:
        weight[link["source"]] += abs(link["weight"])
    total, so_far = sum(weight.values()) or 1.0, 0.0
    for key in sorted(weight, key=weight.get, reverse=True):
        so_far += weight[key]
        drawn.nodes[key]["influence"] = 0.0 if key in ends else min(so_far / total, 1.0)
