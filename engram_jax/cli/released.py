"""Commands for weights that come from elsewhere: `import`, and `overlay` for what was changed."""

from engram_jax.cli.words import Commands, Options, add_command, add_json, say
from engram_jax.config import require
from engram_jax.settings import json_text


def add(commands: Commands) -> None:
    _add_import(commands)
    _add_overlay(commands)


def _add_import(commands: Commands) -> None:
    command = add_command(
        commands, import_weights, "bring in the memory of DeepSeek-V4.1 or Qwen3.8 from its "
        "safetensors, or a run that was exported", "import DeepSeek-V4.1-Flash --out memories/v41",
        name="import")
    command.add_argument("folder", metavar="FOLDER", help="config.json with its safetensors")
    command.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    command.add_argument("--hash", metavar="FILE", default=None,
                         help="the hash.json of a DeepSeek-V4.1 that was imported before; else its "
                         "token map is made of tokenizer.json")


def import_weights(options: Options) -> None:
    from engram_jax.interop.importing import import_folder

    say(f"imported: {import_folder(options.folder, options.out, options.hash, say)}")


def _add_overlay(commands: Commands) -> None:
    command = add_command(
        commands, overlay, "make an overlay of the rows in which two table files differ, or say "
        "what is in one", "overlay mine.safetensors --base old.table --changed new.table")
    command.add_argument("file", metavar="FILE", help="the overlay")
    command.add_argument("--base", metavar="TABLE", help="make it: the table as it was")
    command.add_argument("--changed", metavar="TABLE", help="make it: the table as it is now")
    add_json(command)


def overlay(options: Options) -> None:
    from engram_jax.interop.overlay import read_overlay, write_difference

    require(bool(options.base) == bool(options.changed), "changed", options.changed,
            "an overlay is made of two tables: give both --base and --changed")
    if options.base:
        write_difference(options.base, options.changed, options.file)
    made = read_overlay(options.file)
    rows, dtype, dim = len(made.ids_U), made.format.dtype, made.format.dim
    if options.json:
        say(json_text({"rows": rows, "dtype": dtype, "dim": dim, "base": made.base}))
        return
    say(f"{options.file}: {rows:,} rows of {dim} columns in {dtype}, over the table "
        f"{made.base[:12]}")
