"""`torch.compile` and `torch.export` take the model as it is: as one graph, and with the hooks it has at each call.

In one process of its own: the suite's shape checks cannot be compiled, and a process takes seconds to start.
"""

import subprocess
import sys

import bilens

CODE = """
import copy, sys, torch, bilens
model = bilens.load(sys.argv[1])
tokens, longer = torch.tensor([[1, 5, 7, 6, 9]]), torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])

print("hooks of a compiled model", flush=True)
halve = [("blocks.1.hook_mlp_out", lambda value, hook: value.mul_(0.5))]
plain, hooked = model(tokens), model.run_with_hooks(tokens, fwd_hooks=halve)
in_place = copy.deepcopy(model)
in_place.compile(backend="eager")
for compiled, run in ((in_place, in_place), (model, torch.compile(model, backend="eager"))):
    torch.testing.assert_close(run(tokens), plain)
    with compiled.hooks(fwd_hooks=halve):
        torch.testing.assert_close(run(tokens), hooked)
    torch.testing.assert_close(run(tokens), plain)

torch.compiler.reset()  # what was compiled with breaks allowed would be taken for one graph
print("one graph", flush=True)
mask = torch.tensor([[0, 1, 1, 1, 1]])
whole = torch.compile(model, backend="eager", fullgraph=True)
torch.testing.assert_close(whole(tokens), model(tokens))
torch.testing.assert_close(whole(tokens, "loss"), model(tokens, "loss"))
torch.testing.assert_close(whole(tokens, attention_mask=mask), model(tokens, attention_mask=mask))

print("export", flush=True)
some = {"input": {1: torch.export.Dim("seq", min=2, max=32)}}
exported = torch.export.export(model, (tokens,), dynamic_shapes=some)
for asked in (tokens, longer):
    torch.testing.assert_close(exported.module()(asked), model(asked))
"""


def test_compiled_and_exported_it_is_the_model(make_model, tmp_path):
    bilens.save(make_model(), tmp_path / "model")
    done = subprocess.run([sys.executable, "-c", CODE, tmp_path / "model"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines() == ["hooks of a compiled model", "one graph", "export"]
