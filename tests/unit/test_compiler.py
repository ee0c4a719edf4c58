"""torch's compiler is not loaded for training, and is there as soon as something uses it."""

from __future__ import annotations

import subprocess
import sys

TRAIN = """
import importlib.util, inspect, os, sys
import torch
import torch.utils.checkpoint
from torch import distributed
from paceline.train.compiler import put_off_compiler

put_off_compiler()
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
model = torch.nn.Linear(4, 2)
for kind in (torch.optim.SGD, torch.optim.AdamW):
    optimizer = kind(model.parameters(), lr=0.1)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
x = torch.ones(3, 4, requires_grad=True)
torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
torch._subclasses.FakeTensorMode()  # as models are built without memory
config = torch._dynamo.config
inspect.stack()  # torch's elastic agent calls it, and it looks at all modules
assert importlib.util.find_spec("torch._dynamo").origin.endswith("__init__.py")
assert "torch._dynamo.eval_frame" not in sys.modules, "the compiler was loaded"
distributed.destroy_process_group()
"""
USE = """
USES = [
    "assert torch._dynamo.config.verbose is False",
    "assert torch._dynamo.trace_rules.lookup",
    "import torch._dynamo.config",
    "from torch._dynamo import allow_in_graph",
    "assert torch.compiler.disable(model.forward) is not model.forward",
]
for use in USES:
    if os.fork() == 0:
        try:
            exec(use)
            assert torch._dynamo.eval_frame and torch._dynamo.__file__
            assert torch._dynamo.config is config is sys.modules["torch._dynamo.config"]
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.wait()
    assert status == 0, use
"""
COMPILE = """
kept = vars(torch.optim.Optimizer.add_param_group.__wrapped__)
assert "__dynamo_disable" in kept
found = torch.compile(lambda x: model(x).sum(), backend="eager")(torch.ones(3, 4))
torch.testing.assert_close(found, model(torch.ones(3, 4)).sum())
assert "__dynamo_disable" not in kept
torch.optim.SGD(model.parameters(), lr=0.1).step()
assert kept["__dynamo_disable"] is not torch.optim.Optimizer.add_param_group.__wrapped__
"""


def test_the_compiler_is_loaded_when_it_is_used_and_optimizers_are_then_kept_from_it():
    subprocess.run([sys.executable, "-c", TRAIN + USE + COMPILE], check=True, timeout=200)
