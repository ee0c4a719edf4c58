"""The peer in JAX: the jobs of peer_jobs.py, data-parallel over the host's devices in one process, by turns (turns.py).

    XLA_FLAGS=--xla_force_host_platform_device_count=2 JAX_PLATFORMS=cpu \\
        torchrun --standalone --nproc-per-node 1 benchmarks/peer_jax.py JOB_FILE FOLDER

The network is written out in JAX; its first weights are those of the job's model, its samples come from the job's
data in the order of the other programs, and the optimizer has the settings of the job's. `shard_map` gives each
device its share of the batch; gradients are averaged by `pmean`, and so are batch statistics: the same training as
in one process.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import torch
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from peer_script import SEED, batches, seeded_model, trained
from turns import Player

import paceline
from paceline.train.session import Datasets

AXIS = "data"
Arrays = dict[str, Any]


def linear(p: Arrays, name: str, x: Any) -> Any:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def layer_norm(p: Arrays, name: str, x: Any) -> Any:
    return jax.nn.standardize(x, epsilon=1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def gpt(model: torch.nn.Module) -> Callable[[Arrays, Arrays, Any], tuple[Any, Arrays]]:
    heads = model.blocks[0].heads

    def block(p: Arrays, name: str, x_btd: Any) -> Any:
        b, t, d = x_btd.shape
        qkv = linear(p, f"{name}.qkv", layer_norm(p, f"{name}.attention_norm", x_btd))
        q, k, v = (part[:, :, 0] for part in jnp.split(qkv.reshape(b, t, 3, heads, -1), 3, axis=2))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, d)
        x_btd = x_btd + linear(p, f"{name}.out", mixed)
        up = linear(p, f"{name}.up", layer_norm(p, f"{name}.mlp_norm", x_btd))
        return x_btd + linear(p, f"{name}.down", jax.nn.gelu(up, approximate=False))

    def forward(p: Arrays, statistics: Arrays, tokens: Any) -> tuple[Any, Arrays]:
        x_btd = p["tokens.weight"][tokens] + p["places.weight"][: tokens.shape[1]]
        for number in range(len(model.blocks)):
            x_btd = block(p, f"blocks.{number}", x_btd)
        return layer_norm(p, "norm", x_btd) @ p["tokens.weight"].T, statistics

    return forward


def batch_norm(p: Arrays, statistics: Arrays, name: str, x: Any) -> tuple[Any, Arrays]:
    """Over the global batch; and the running statistics, updated by a tenth."""
    mean = lax.pmean(x.mean((0, 1, 2)), AXIS)
    variance = lax.pmean(jnp.square(x - mean).mean((0, 1, 2)), AXIS)
    count = x.size // x.shape[-1] * lax.axis_size(AXIS)
    now = {"running_mean": mean, "running_var": variance * (count / (count - 1))}
    running = {
        f"{name}.{kind}": 0.9 * statistics[f"{name}.{kind}"] + 0.1 * lax.stop_gradient(value)
        for kind, value in now.items()
    }
    return (x - mean) * lax.rsqrt(variance + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"], running


def conv_net(model: torch.nn.Module) -> Callable[[Arrays, Arrays, Any], tuple[Any, Arrays]]:
    """Channels come last, as XLA's convolutions on CPUs want them."""

    def forward(p: Arrays, statistics: Arrays, images: Any) -> tuple[Any, Arrays]:
        x, running = images.transpose(0, 2, 3, 1), dict(statistics)
        for number in range(len(model.convolutions)):
            kernel = p[f"convolutions.{number}.weight"].transpose(2, 3, 1, 0)
            x = lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x, updated = batch_norm(p, statistics, f"norms.{number}", x)
            running.update(updated)
            x = jax.nn.relu(x)
            if number % 2:
                x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return linear(p, "leave", x.mean((1, 2))), running

    return forward


def mlp(model: torch.nn.Module) -> Callable[[Arrays, Arrays, Any], tuple[Any, Arrays]]:
    def forward(p: Arrays, statistics: Arrays, x: Any) -> tuple[Any, Arrays]:
        last = len(model.layers) - 1
        for number in range(last):
            x = jax.nn.relu(linear(p, f"layers.{number}", x))
        return linear(p, f"layers.{last}", x), statistics

    return forward


PORTS = {"GPT": gpt, "ConvNet": conv_net, "MLP": mlp}


def mean_loss(outputs: Any, targets: Any) -> Any:
    """Cross-entropy where targets are classes, else the mean squared error."""
    if jnp.issubdtype(targets.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()
    return jnp.square(outputs - targets).mean()


def optimizer_like(optimizer: torch.optim.Optimizer) -> optax.GradientTransformation:
    """The same arithmetic with the same settings."""
    settings = optimizer.defaults
    if isinstance(optimizer, torch.optim.AdamW):
        beta1, beta2 = settings["betas"]
        return optax.adamw(
            settings["lr"], beta1, beta2, settings["eps"], weight_decay=settings["weight_decay"]
        )
    if isinstance(optimizer, torch.optim.SGD):
        return optax.sgd(settings["lr"], settings["momentum"], nesterov=settings["nesterov"])
    raise NotImplementedError(f"{type(optimizer).__name__} has no counterpart here: add it to optimizer_like")


def build_step(forward: Callable[..., Any], optimizer: optax.GradientTransformation, mesh: Any) -> Any:
    """`(state, inputs, targets) -> (state, global mean loss)`, compiled."""

    def step(state: tuple[Arrays, Arrays, Any], inputs: Any, targets: Any) -> tuple[Any, Any]:
        parameters, statistics, moments = state

        def loss_of(p: Arrays) -> tuple[Any, Arrays]:
            outputs, running = forward(p, statistics, inputs)
            return mean_loss(outputs, targets), running

        (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        loss, gradients = lax.pmean((loss, gradients), AXIS)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return (optax.apply_updates(parameters, updates), statistics, moments), loss

    whole, share = PartitionSpec(), PartitionSpec(AXIS)
    # Without the check of what varies: gradients are then each device's own, and averaged above.
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(whole, share, share), out_specs=(whole, whole), check_vma=False
    )
    return functools.partial(jax.jit, donate_argnums=0)(sharded)


def arrays(tensors: dict[str, torch.Tensor]) -> Arrays:
    return {name: np.array(tensor.detach()) for name, tensor in tensors.items()}


def main() -> None:
    job, folder = paceline.load_job(sys.argv[1]), Path(sys.argv[2])
    model = seeded_model(job)
    optimizer = optimizer_like(job.optimizer(trained(model)))
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,))
    step = build_step(PORTS[type(model).__name__](model), optimizer, mesh)
    # A weight that two modules share is one entry, under its first name.
    parameters, statistics = arrays(dict(model.named_parameters())), arrays(dict(model.named_buffers()))
    state = (parameters, statistics, optimizer.init(parameters))
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    spread = NamedSharding(mesh, PartitionSpec(AXIS))
    player = Player(folder, 0, lambda: None)
    stream = batches(job, Datasets(job, SEED)["train"], rank=0, size=1)
    for turn in player.turns():
        for inputs, targets in itertools.islice(stream, turn.steps):
            placed = jax.device_put((inputs.numpy(), targets.numpy()), spread)
            state, loss = step(state, *placed)
            player.stepped(len(inputs), float(loss) if turn.compared else None)
            loss.block_until_ready()


if __name__ == "__main__":
    main()
