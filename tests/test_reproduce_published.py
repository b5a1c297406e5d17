"""The published models' table and page, end to end: from a Hub on this machine that serves a planted twin."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import twin
from hub_server import as_the_hub, contents
from huggingface_hub import constants
from twin import MODEL, SCOPE

import bilens
from bilens.circuits.compiled import write_scope

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
script = pytest.importorskip("reproduce_published")
measures = sys.modules["published_measures"]
sys.path.remove(str(SCRIPTS))

N_TEXTS = 24


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Return the twin's files by repository and name."""
    return twin.files(tmp_path_factory.mktemp("twin"))


@pytest.fixture(scope="module")
def reference() -> twin.Reference:
    return twin.Reference(twin.make_texts(N_TEXTS))


@pytest.fixture
def served(hub, files):
    """A Hub with the twin on it."""
    hub.serve(files)
    return hub


@pytest.fixture
def command(tmp_path):
    return command_in(tmp_path)


def command_in(folder):
    """Write the texts, and return what gives the arguments of a run whose output is in a folder of that name."""
    corpus = twin.write_texts(folder / "texts.jsonl", twin.make_texts(N_TEXTS))
    options = ["--models", "ts-medium", "--tinystories", str(corpus), "--sequences", str(N_TEXTS)]
    return lambda out="out", *more: [*options, "--out", str(folder / out), *more]


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):
    """The folder of a run that nothing disturbed, which ended well: its output in `out`, the Hub's cache in `hub`."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch, as_the_hub(patch, folder / "hub") as hub:
        hub.serve(files)
        end = run(command_in(folder)())
    assert end.startswith("10 of "), end
    return folder


def run(arguments: list[str]) -> str:
    """Run the script to its end, and return what it ends with: the twin has SAEs of layer 4 alone."""
    with pytest.raises(SystemExit) as end:
        script.main(arguments)
    return str(end.value)


def results(folder: Path) -> dict[str, dict]:
    return {
        path.stem: json.loads(path.read_text())["result"] for path in (folder / "results" / "ts-medium").glob("*.json")
    }


def close(found, wanted):
    """Every planted number is met within 1e-3."""
    assert np.asarray(found) == pytest.approx(np.asarray(wanted), abs=1e-3)


# -- what was planted -------------------------------------------------------------------------------------------------


def test_every_planted_number_is_found(straight, reference):
    found = results(straight / "out")
    check_losses(found, reference)
    for feature in (twin.NOT_GOOD, twin.NOT_BAD):
        check_output(found["circuit"]["features"][str(feature)], feature, reference)
    close(found["circuit"]["cosine"], twin.COSINE)
    check_low_rank(found["low-rank"], reference)
    check_ranking(found["ranking"], reference)
    page = (straight / "out" / "page.html").read_text()
    assert "-0.66281" in page
    assert page.count('class="plot"') == 10
    assert "http://" not in page.split("<script")[0]


def check_losses(found, reference):
    close(found["loss"]["loss"], reference.loss())
    for point in ("mlp-out", "resid-mid"):
        one = found[f"added-4-{point}-x4-k30"]
        close(one["loss"], reference.loss())
        close(one["spliced"], reference.loss(point))
        assert one["spliced"] != pytest.approx(one["loss"], abs=2e-3)


def check_output(one, feature, reference):
    z, x, y = reference.seen()
    values, _ = reference.spectrum(feature)
    close(sorted(one["values"][:2]), sorted(twin.VALUES if feature == twin.NOT_GOOD else twin.OPPOSED))
    close(np.abs(one["values"][: len(values)]), np.abs(values))
    order = [f for group in (twin.BAD, twin.GOOD, twin.NEGATED) for f in group]
    vectors = sorted(zip(one["values"], range(2), strict=False), reverse=feature == twin.NOT_GOOD)
    for (_, column), vector in zip(vectors, twin.eigenvectors(), strict=True):
        wanted = [vector[f] for f in order]
        plane = np.array(one["plane"])[:, column]
        close(plane * np.sign(plane @ wanted), wanted)
    Q = reference.matrix(feature)
    some = [reference.i[f] for f in order]
    close(one["matrix"], Q[np.ix_(some, some)])
    members = set(order)
    assert all({i, j} <= members for i, j, _ in one["pairs"][:10])
    i, j, value = one["pairs"][0]
    close(value, 2 * Q[reference.i[i], reference.i[j]])
    actual, within = y[feature], reference.predicted(feature, x, 2)
    raw, active = reference.predicted(feature, z, 2), actual != 0
    assert one["active"] == active.sum() > 100
    close(one["pearson"], twin.pearson(within, actual))
    close(one["pearson active"], twin.pearson(within[active], actual[active]))
    close(one["pearson raw"], twin.pearson(raw, actual))
    assert abs(one["pearson raw active"] - one["pearson active"]) > 1e-3


def check_low_rank(found, reference):
    _, x, y = reference.seen()
    rows = {row["feature"]: row for row in found["rows"]}
    assert set(rows) == {f for f, actual in y.items() if (actual != 0).sum() >= measures.LEAST}
    for feature, row in rows.items():
        values, _ = reference.spectrum(feature)
        active = y[feature] != 0
        assert row["active"] == active.sum()
        close(row["rank"], np.abs(values).sum() ** 2 / (values**2).sum())
        for k in (2, 4, 16):
            within = reference.predicted(feature, x, k)
            close(row["pearson"][k - 1], twin.pearson(within[active], y[feature][active]))
        two = reference.predicted(feature, x, 2)
        close(row["all"], twin.pearson(two, y[feature]))
        close(row["r2"], 1 - np.var((y[feature] - two)[active]) / np.var(y[feature][active]))


def check_ranking(found, reference):
    assert found["top"][:5] == [1179, 1882, 461, 111, 1219]
    for feature in found["top"][:5]:
        wanted = np.abs(reference.spectrum(feature)[0][:2]).sum()
        close(found["strength"][str(feature)], wanted)
    made = twin.build()
    B = made.model.blocks[4].mlp.tensor().detach()
    for feature in found["top"][:5]:
        raw = torch.einsum("h,hi,hj->ij", made.out[feature] @ B.down, B.left, B.right).numpy()
        coded = np.sort(np.abs(np.linalg.eigvalsh(raw)))[-2:].sum()  # reads the lower triangle
        close(found["as coded"][str(feature)], coded)
        assert abs(coded - found["strength"][str(feature)]) > 0.01


# -- from killed to the same page -------------------------------------------------------------------------------------


def test_killed_and_resumed_gives_the_same_page(served, straight, command, tmp_path, monkeypatch):
    home = tmp_path / "home"
    environment = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": served.url, "PYTHONPATH": str(SCRIPTS.parent)}
    line = [sys.executable, str(SCRIPTS / "reproduce.py"), "published", *command()]
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    first = tmp_path / "out" / "results" / "ts-medium" / "circuit.json"
    while not first.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out" / "page.html").exists()
    written = first.stat().st_mtime_ns
    run(command())
    assert first.stat().st_mtime_ns == written
    page = (tmp_path / "out" / "page.html").read_bytes()
    assert page == (straight / "out" / "page.html").read_bytes()
    monkeypatch.setattr(measures, "curves", lambda *args: pytest.fail("was measured again"))
    run(command())
    assert (tmp_path / "out" / "page.html").read_bytes() == page


def test_a_killed_measurement_goes_on_where_it_was(served, command, tmp_path, monkeypatch):
    whole, calls = measures.curves, []

    def few(B, readers, seen, some):
        calls.append(len(some))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(B, readers, seen, some)

    monkeypatch.setattr(measures, "BLOCK", 16)
    monkeypatch.setattr(measures, "curves", few)
    with pytest.raises(KeyboardInterrupt):
        script.main(command())
    run(command())
    features = len(results(tmp_path / "out")["low-rank"]["rows"])
    assert sum(calls) == features + calls[1]


def test_other_text_is_measured_again(served, straight, command, tmp_path):
    shutil.copytree(straight / "out", tmp_path / "out")
    before = results(tmp_path / "out")
    (tmp_path / "texts.jsonl").unlink()
    twin.write_texts(tmp_path / "texts.jsonl", twin.make_texts(N_TEXTS, seed=1))
    run(command())
    after = results(tmp_path / "out")
    assert after["loss"]["loss"] != before["loss"]["loss"]
    assert after["low-rank"]["rows"] != before["low-rank"]["rows"]


# -- the Hub ----------------------------------------------------------------------------------------------------------


def test_a_revision_of_either_repository(served, files, command, tmp_path, reference):
    for repo in (MODEL, SCOPE):
        served.commit(repo, files[repo], "paper")
    served.serve(twin.files(tmp_path / "other", seed=1))
    run(command("out", *(part for repo in (MODEL, SCOPE) for part in ("--revision", f"{repo}=paper"))))
    asked = [line for line in served.asked if line.startswith("GET") and " paper " in line]
    assert asked
    check_losses(results(tmp_path / "out"), reference)
    end = run(command("out", "--revision", f"{MODEL}=v9"))
    assert end == f"reproduce.py published: {MODEL} on the Hub has no revision 'v9'"


def test_saes_that_the_hub_does_not_have_are_rows_that_say_so(served, command, capsys):
    del served.repos[SCOPE]
    served.commit(SCOPE, {})
    end = run(command())
    assert "rows were not measured" in end
    printed = capsys.readouterr().out
    assert f"| ts-medium | circuit |  | not measured | {SCOPE} has no SAE for '4-resid-mid-x4-k30'" in printed
    assert "| ts-medium | loss, nats per token (appendices G, I) | 1.337 |" in printed


def test_a_model_that_the_hub_does_not_have_is_refused(served, command):
    del served.repos[MODEL]
    served.commit("tdooms/ts-medium-2", {})
    end = run(command())
    assert end.startswith(f"reproduce.py published: {MODEL!r} is neither a folder here nor a repository on the Hub")
    assert "tdooms/ts-medium-2" in end


def test_an_interrupted_download_goes_on(served, command, tmp_path, reference):
    served.cut.add("model.safetensors")
    with pytest.raises(OSError, match="file should be of size"):
        script.main(command())
    served.cut.clear()
    served.drop_once |= {"model.safetensors", "4-mlp-out-x4-k30/model.safetensors"}
    run(command())
    assert not served.drop_once
    check_losses(results(tmp_path / "out"), reference)


def test_offline_from_the_cache_gives_the_same_page(served, straight, offline, command, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(straight / "hub"))
    offline()
    run(command())
    assert served.asked == []
    pages = [(folder / "out" / "page.html").read_text() for folder in (straight, tmp_path)]
    tables = [re.sub(r"<tr>.*not measured.*</tr>", "", page) for page in pages]  # why is another matter offline
    assert tables[0] == tables[1]


# -- the other models -------------------------------------------------------------------------------------------------


@pytest.fixture
def fineweb(served, make_model, tmp_path):
    """A model of fw-medium's depth, with random weights, and SAEs of it that come ever closer to one of them."""
    model = make_model(n_layers=13, d_model=32, d_hidden=40, n_heads=2, dtype=torch.float32, attn_scale=26**-0.5)
    bilens.save(model, tmp_path / "fw")
    served.commit("tdooms/fw-medium", contents(tmp_path / "fw"))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(256, 32, generator=generator)
    wide, scope = torch.nn.functional.normalize(rows, dim=1), tmp_path / "fw-scope"
    write_scope(scope / "12-mlp-out-x4-k30", ("mlp-out", 12), wide[:128], 8)
    write_scope(scope / "7-mlp-out-x8-k30", ("mlp-out", 7), wide, 8)
    for version in range(5):
        write_scope(scope / f"12-mlp-out-x16-k30-v{version}", ("mlp-out", 12), wide, 4 + 2 * version)
    served.commit("tdooms/fw-medium-scope", contents(scope))
    return model, wide


def test_fineweb_models_are_measured_by_brute_force_too(fineweb, command, tmp_path, capsys):
    model, wide = fineweb
    corpus = tmp_path / "web.jsonl"
    words = ("the cat sat on the mat and the dog ran", "once upon a time the big dog saw little cats", "a mat sat")
    corpus.write_text("".join(f"{json.dumps({'text': f'{one} {other}'})}\n" for one in words for other in words))
    script.main(
        ["--models", "fw-medium", "--fineweb", str(corpus), "--out", str(tmp_path / "fw-out"), "--sequences", "9"]
    )
    folder = tmp_path / "fw-out" / "results" / "fw-medium"
    found = {path.stem: json.loads(path.read_text())["result"] for path in folder.glob("*.json")}
    _, cache = model.run_with_cache([f"{one} {other}" for one in words for other in words])
    _, mask = model.encode([f"{one} {other}" for one in words for other in words], True, "right", False)
    mask[:, 0] = False
    x, y = (cache[f"blocks.12.{hook}"][mask] for hook in ("hook_mlp_in", "hook_mlp_out"))
    B = model.blocks[12].mlp.tensor().detach()
    for version in range(5):
        one = found[f"scaled-12-mlp-out-x16-k30-v{version}"]
        z = torch.from_numpy(twin.top_k((y @ wide.T).detach().numpy(), 4 + 2 * version))
        close(one["nmse"], ((y - z @ wide).pow(2).sum() / y.pow(2).sum()).item())
        r = []
        for feature in range(256):
            at = z[:, feature] != 0
            if at.sum() >= measures.LEAST:
                Q = B.matrix(wide[feature])
                values, vectors = torch.linalg.eigh(Q)
                top = values.abs().topk(2).indices
                two = (x[at] @ vectors[:, top]).pow(2) @ values[top]
                r.append(twin.pearson(two.numpy(), z[at, feature].numpy()))
        close(one["pearson at 10"], np.mean(r))
        assert one["features at 10"] == len(r)
    strength = [torch.linalg.eigvalsh(M).abs().topk(2).values.sum() for M in model.blocks[7].mlp.tensor().matrix(wide)]
    assert found["ranking"]["top"] == torch.stack(strength).argsort(descending=True)[:10].tolist()
    printed = capsys.readouterr().out
    assert "appendix H" in (tmp_path / "fw-out" / "page.html").read_text()
    assert printed.count("| fw-medium |") > 20


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sequences", "0"], "--sequences must be at least 1, got 0"),
        (["--revision", "tdooms/ts-medium"], "--revision must be REPO=REVISION, got 'tdooms/ts-medium'"),
        (["--tinystories", "no.parquet"], "--tinystories must be a file or a Hub dataset, got no.parquet"),
        (["--models", "ts-tiny"], "invalid choice: 'ts-tiny'"),
    ],
)
def test_a_wrong_argument_is_refused(more, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(more)
    assert message in capsys.readouterr().err
