"""One of several processes for test_processes: `engram-jax train` with a loop of exchanges.

What it does is told by the environment: PEER_DOES in process PEER_WHO, at the tenth exchange. With
PEER_RUN, the JSON of a run, it is the real `engram-jax train` of that run; gs:// is the store of
`object_store`.
"""

import json
import os
import sys
import time

import jax
import numpy as np
import object_store
from jax.sharding import NamedSharding, PartitionSpec

from engram_jax import distributed
from engram_jax.cli import main, runs
from engram_jax.errors import MachineError
from engram_jax.runs import train as runs_train
from engram_jax.settings import from_dict, to_dict

STEPS = 20


def train(run, directory, say, mesh, profile):
    del directory, mesh, profile
    distributed.agree("the config", to_dict(run))
    process = jax.process_index()
    with distributed.after_first("the packing"):
        print(f"packed by {process} at {time.monotonic()}", flush=True)
    exchange, x = compiled()
    for step in range(STEPS):
        if step == STEPS // 2 and os.environ.get("PEER_WHO") == str(process):
            does[os.environ["PEER_DOES"]]()
        x = exchange(x)
        x.block_until_ready()
        say(f"exchange {step}")
    distributed.barrier("the last exchange")
    assert jax.device_count() == 8
    return {"loss": 0.0, "bits_per_byte": 0.0}


def compiled():
    mesh = jax.make_mesh((8,), ("data",))

    def exchange(x):
        swapped = jax.lax.all_to_all(x, "data", 0, 0, tiled=True)
        return swapped + jax.lax.psum(x, "data")[:, :1] * 0

    jitted = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=PartitionSpec("data"),
                                   out_specs=PartitionSpec("data")))
    ones = np.ones((64, 4), np.float32)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jitted, jax.make_array_from_callback(ones.shape, sharding, lambda part: ones[part])


def die():
    os.kill(os.getpid(), 9)


def hang():
    os.kill(os.getpid(), 19)


def disk_full():
    raise MachineError("the disk is full")


def bug():
    raise ZeroDivisionError("a bug")


does = {function.__name__: function for function in (die, hang, disk_full, bug)}

if __name__ == "__main__":
    if text := os.environ.get("PEER_RUN"):
        object_store.use()
        runs.named_run = lambda options: from_dict(json.loads(text))
    else:
        runs_train.train = train
    sys.exit(main.main(sys.argv[1:]))
