"""``trivium convert``: a Trivium checkpoint to a Hugging Face folder, or the other way round, as the source is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from trivium.base import config, log
from trivium.base.errors import CheckpointError, ConfigError
from trivium.base.units import format_count, parse_bytes
from trivium.cli.interrupts import load_torch
from trivium.cli.output import print_json, word_console

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_CONFIG = "config.json"


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("convert", help="Turn a checkpoint into Hugging Face layout, or the other way round.")(convert)


def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint, a run's folder (its newest), or a Hugging Face folder.")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    plain: Annotated[bool, typer.Option("--plain", help="Keep all names and write no config.json.")] = False,
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="Pack the weights for inference: int8 or int4.")
    ] = None,
    max_shard: Annotated[str, typer.Option("--max-shard", help="Largest file to write, such as 5GB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is in TARGET.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Convert tensor by tensor; memory stays at one block. No code in the source is ever run."""
    log.setup()
    load_torch()
    from trivium import checkpoint

    if quantize is not None:
        if plain:
            raise ConfigError("--quantize and --plain: packed weights have names of their own; leave one out")
        _tell(_pack(source, target, quantize, max_shard_bytes=parse_bytes(max_shard), overwrite=overwrite), as_json)
        return
    path = source
    if source.is_dir() and not (source / "manifest.json").exists():
        path = checkpoint.latest(source) or source
    if (path / "manifest.json").exists():
        report = _export(path, target, plain=plain, max_shard_bytes=parse_bytes(max_shard), overwrite=overwrite)
    else:
        report = _import(path, target, plain=plain, overwrite=overwrite)
    _tell(report, as_json)


def _tell(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    count = format_count(report["parameters"])
    word_console().print(
        f"{report['source']} → {report['target']}: {report['format']}, {count} parameters", soft_wrap=True
    )


def _pack(path: Path, target: Path, quantize: str, *, max_shard_bytes: int, overwrite: bool) -> dict[str, Any]:
    """Anything that inference loads becomes a folder that it loads without packing."""
    from trivium.inference.quantized import write_quantized

    written, parameters = write_quantized(
        path, target, quantize=quantize, max_shard_bytes=max_shard_bytes, overwrite=overwrite
    )
    _copy_tokenizer((path, path.parent) if (path / "manifest.json").exists() else (path,), written)
    return _report(path, written, f"{quantize} weights for inference", parameters)


def _export(path: Path, target: Path, *, plain: bool, max_shard_bytes: int, overwrite: bool) -> dict[str, Any]:
    """A checkpoint becomes a Hugging Face folder."""
    from trivium.checkpoint.convert import describe, to_hugging_face
    from trivium.models import LLAMA, DecoderConfig

    found = describe(path)
    if plain:
        written = to_hugging_face(path, target, max_shard_bytes=max_shard_bytes, overwrite=overwrite)
    else:
        told = found.extra.get("model") if isinstance(found.extra, dict) else None
        if not isinstance(told, dict):
            raise CheckpointError(
                f"{path} does not say what model it holds (extra['model'] is missing): pass --plain to keep the names "
                "and write no config.json"
            )
        model = config.build(DecoderConfig, told, f"{path}: extra.model")
        if model.moe is not None:
            raise ConfigError(
                f"{path} holds a decoder with experts, for which there is no Hugging Face layout: pass --plain to keep "
                "the names and write no config.json, or --quantize; generate, chat and serve read the checkpoint itself"
            )
        written = to_hugging_face(
            path,
            target,
            names=LLAMA.to_theirs,
            config={**LLAMA.to_hugging_face(model, dtype=found.dtype), **_token_ids((target, path, path.parent))},
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
        )
    _copy_tokenizer((path, path.parent), written)
    return _report(path, written, "Hugging Face", found.num_parameters)


def _import(path: Path, target: Path, *, plain: bool, overwrite: bool) -> dict[str, Any]:
    """A Hugging Face folder becomes a checkpoint of one rank."""
    from trivium.checkpoint.convert import describe, from_hugging_face
    from trivium.checkpoint.folders import read_config
    from trivium.checkpoint.reading import refuse_pickle
    from trivium.models import family_of

    if not (path.is_dir() and any(path.glob("*.safetensors"))):
        refuse_pickle(path)
    if plain:
        written = from_hugging_face(path, target, overwrite=overwrite)
    else:
        theirs = read_config(path)
        family = family_of(theirs)
        model = family.from_hugging_face(theirs)

        def ours(name: str) -> str | None:
            found = family.to_ours(name)
            return None if model.tied and found == family.tied[0] else found

        written = from_hugging_face(
            path, target, names=ours, extra={"model": config.to_dict(model)}, overwrite=overwrite
        )
    _copy_tokenizer((path,), written.parent)
    return _report(path, written, "Trivium checkpoint", describe(written).num_parameters)


def _token_ids(folders: tuple[Path, ...]) -> dict[str, int]:
    """What config.json says of the tokenizer that will lie beside it: the ids that end, begin and pad a text."""
    from trivium.base.errors import DataError
    from trivium.train.data import Tokenizer

    folder = next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)
    if folder is None:
        return {}
    try:
        using = Tokenizer.load(folder)
    except DataError as error:
        log.get().warning("config.json names no token that ends a text: %s", error)
        return {}
    found = {"eos_token_id": using.end_id, "bos_token_id": using.begin_id, "pad_token_id": using.pad_id}
    return {key: number for key, number in found.items() if number is not None}


def _copy_tokenizer(sources: tuple[Path, ...], target: Path) -> None:
    """Take the tokenizer along where there is one; one that is in ``target`` already stays."""
    for name in _TOKENIZER:
        for folder in sources:
            if (folder / name).is_file() and not (target / name).exists():
                shutil.copyfile(folder / name, target / name)
                break


def _report(source: Path, target: Path, kind: str, num_parameters: int) -> dict[str, Any]:
    files = sorted(path.name for path in target.iterdir() if path.is_file())
    return {
        "source": str(source),
        "target": str(target),
        "format": kind,
        "parameters": num_parameters,
        "files": files,
    }
