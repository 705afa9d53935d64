"""The command that measures this machine: `bench`."""

import os
import typing

from engram_jax.cli.words import Commands, Options, add_command, add_json
from engram_jax.config import require
from engram_jax.errors import UserError
from engram_jax.settings import json_text


def add(commands: Commands) -> None:
    command = add_command(
        commands, bench,
        "measure this machine: hash (jitted against NumPy), table (row updates against the table's "
        "size), optimizers (of tables), exchange (rows on eight devices against a sharded gather), "
        "step (the real training step: tokens/s, MFU, time by part), experts (one token among many "
        "experts, against the picked ones alone; on accelerators a batch, too), attention (of one "
        "long sequence, by each implementation), gather (tokens to packed rows from a table in "
        "host memory), offload (inference with the table on the device, the host and a disk, "
        "against no memory), pack (a text on one core and on all)", "bench hash --json")
    command.add_argument("what", choices=["hash", "table", "optimizers", "exchange", "gather",
                                          "offload", "pack", "step", "experts",
                                          "attention"])
    command.add_argument("--megabytes", type=int, default=0, metavar="N",
                         help="of bench pack: size of the gzipped text (default 64); 2000 is the "
                         "text that has to fit 1 GiB of memory, and takes half an hour")
    command.add_argument("--size", choices=["tiny", "small", "4b", "27b"], default="",
                         help="of bench offload: tiny (default), or 4b, a dense model of 4.1B "
                         "parameters with a table of 42 GB, for an accelerator; of bench step: "
                         "tiny (default on a CPU), small (default elsewhere), or 27b, four blocks "
                         "of engram-27b, for a device of 80 GB")
    command.add_argument("--mesh", default="", metavar="DATAxFSDP[xEXPERT]",
                         help="of bench step: as train takes it")
    command.add_argument("--length", type=int, default=0, metavar="N",
                         help="of bench attention: tokens of the sequence (default: 32768, on a "
                         "CPU 2048)")
    command.add_argument("--topology", default="", metavar="CHIP:LAYOUT",
                         help="of bench attention: a TPU slice, such as v5p:1x1x1, to compile for; "
                         "nothing runs")
    command.add_argument("--requests", type=int, default=0, metavar="N",
                         help="of bench offload: the first N requests alone, each arm once")
    command.add_argument("--trace", default="", metavar="DIR",
                         help="of bench offload: write a trace of a few requests, for Perfetto")
    add_json(command)


def bench(options: Options) -> None:
    result = _measured(options)
    if options.json:
        print(json_text(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name:<28} {value:,.4g}" if isinstance(value, float) else f"{name:<28} {value}")


def _workload(
    options: Options, workloads: dict[str, typing.Callable[[], typing.Any]], default: str
) -> typing.Any:
    size = options.size or default
    require(size in workloads, "size", size,
            f"must be one of {', '.join(workloads)} for bench {options.what}")
    return workloads[size]()


def _measured(options: Options) -> dict[str, typing.Any]:
    what = options.what
    for name, of in (("size", ("offload", "step")), ("trace", ("offload",)), ("mesh", ("step",)),
                     ("requests", ("offload",)),
                     ("length", ("attention",)), ("topology", ("attention",))):
        if getattr(options, name) and what not in of:
            raise UserError(f"--{name} is of bench {' and '.join(of)}, not of bench {what}")
    if options.megabytes and what != "pack":
        raise UserError(f"--megabytes is of bench pack, not of bench {what}")
    match what:
        case "offload":
            from engram_jax.benchmarks import offload

            work = _workload(options, offload.WORKLOADS, "tiny")
            return offload.offload_benchmark(
                offload.shortened(work, options.requests) if options.requests else work,
                options.trace)
        case "step":
            import jax

            from engram_jax.benchmarks import step
            from engram_jax.training.placement import chosen_mesh

            mesh = chosen_mesh(options.mesh or None)
            small = "tiny" if jax.default_backend() == "cpu" else "small"
            return step.step_benchmark(_workload(options, step.WORKLOADS, small), mesh)
        case "hash":
            from engram_jax.benchmarks.hashing import hash_benchmark

            return hash_benchmark()
        case "table":
            from engram_jax.benchmarks.table import table_benchmark

            return table_benchmark()
        case "optimizers":
            from engram_jax.benchmarks.row_optimizers import row_optimizer_benchmark

            return row_optimizer_benchmark()
        case "pack":
            from engram_jax.benchmarks.packing import packing_benchmark

            return packing_benchmark(options.megabytes or 64)
        case "experts":
            from engram_jax.benchmarks.experts import expert_benchmark

            return expert_benchmark()
        case "attention":
            from engram_jax.benchmarks.attention import attention_benchmark

            return attention_benchmark(options.length, options.topology)
        case "gather":
            from engram_jax.benchmarks.gather import gather_benchmark

            return gather_benchmark()
    from engram_jax.benchmarks.exchange import DEVICES, exchange_benchmark

    # Read when the first device is asked for; machines with accelerators do not mind it.
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    return exchange_benchmark()
