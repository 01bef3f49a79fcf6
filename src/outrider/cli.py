"""The command line: one short function a verb. Each parses, calls, prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from outrider import __version__
from outrider.console import Display, console, count, duration, size
from outrider.errors import DecodingError, Interrupted, OutriderError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode="rich",
                  help="Train the small model that makes your large one fast.")
data_app = typer.Typer(no_args_is_help=True, help="Turn text into token shards.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure, with the command and the machine on record.")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.")]
TopK = Annotated[int, typer.Option(help="Only the K most likely tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Only the most likely tokens that reach this probability together.")]
Seed = Annotated[Optional[int], typer.Option(help="Makes sampling repeatable.")]  # noqa: UP045 - typer reads it
Width = Annotated[str, typer.Option(help="Tokens to draft each round, or 'auto'.")]
Method = Annotated[str, typer.Option(help="How sampled proposals are verified: rejection or coupled.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"outrider {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version,
                                          help="Print the version and leave.")] = False,
) -> None:
    """Options of every verb; both are dealt with elsewhere."""


@data_app.command("prepare")
def data_prepare(
    sources: Annotated[list[str], typer.Argument(help="stdlib, books, files, folders, or hf:OWNER/NAME[:SPLIT].")],
    out: Annotated[Path, typer.Option(help="Corpus folder to make.")],
    tokenizer: Annotated[str, typer.Option(
        help="tokenizer.json, SentencePiece .model, a folder with one, or bpe:SIZE to train.")] = "bpe:4096",
    text_field: Annotated[str, typer.Option(help="Field that holds the text in .jsonl, parquet, data sets.")] = "text",
    validation: Annotated[float, typer.Option(help="Share of documents held out.")] = 0.01,
    licence: Annotated[str, typer.Option(help="Licence of the texts, for the record.")] = "unknown",
    bad_text: Annotated[str, typer.Option(help="Text that is not UTF-8: error, replace or skip.")] = "error",
    shard_tokens: Annotated[int, typer.Option(help="Most tokens in one file.")] = 1 << 26,
    force: Force = False,
    as_json: JsonFlag = False,
) -> None:
    """Tokenise documents into shards with a manifest."""
    from outrider.corpus import Source, prepare

    if bad_text not in ("error", "replace", "skip"):
        raise typer.BadParameter("use error, replace or skip", param_hint="--bad-text")
    specs = [Source(spec, text_field, licence, bad_text) for spec in sources]  # type: ignore[arg-type]
    with Display("prepare") as display:
        manifest = prepare(specs, out, tokenizer=tokenizer, validation=validation, shard_tokens=shard_tokens,
                           replace=force, watcher=display)
    if as_json:
        _print_json(manifest.model_dump())
    else:
        _show_manifest(manifest, out)


@data_app.command("verify")
def data_verify(folder: Annotated[Path, typer.Argument(help="Corpus folder.")]) -> None:
    """Check every shard's hash against the manifest."""
    from outrider.corpus import verify_corpus

    manifest = verify_corpus(folder)
    console.print(f"{folder}: {len(manifest.shards)} shards as the manifest says")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="TOML recipe; see recipes/.")],
    overrides: Annotated[Optional[list[str]], typer.Option(  # noqa: UP045 - typer reads it
        "--set", metavar="KEY=VALUE", help="Override one key, e.g. training.tokens=2M.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest snapshot.")] = False,
    force: Force = False,
    as_json: JsonFlag = False,
) -> None:
    """Train from scratch or from a model folder, as a recipe says."""
    from outrider.recipe import Recipe
    from outrider.training import train as run

    loaded = Recipe.load(recipe, overrides or [])
    with Display(loaded.name) as display:
        result = run(loaded, resume=resume, replace=force, watcher=display)
    scores = result.validation
    if as_json:
        _print_json({"model": str(result.model), "metrics": str(result.metrics), "steps": result.steps,
                     "tokens": result.tokens, "seconds": result.seconds, "loss": result.loss,
                     "tokens_per_second": result.tokens_per_second,
                     "bits_per_byte": scores.bits_per_byte if scores else None})
        return
    held_out = f", {scores.bits_per_byte:.3f} bits per byte on held-out text" if scores else ""
    console.print(f"{count(result.tokens)} tokens in {duration(result.seconds)} "
                  f"({count(result.tokens_per_second)} tokens/s), loss {result.loss:.3f}{held_out}")
    console.print(f"model: {result.model}", soft_wrap=True)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="TOML recipe.")],
    overrides: Annotated[Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE")] = None,  # noqa: UP045
    as_json: JsonFlag = False,
) -> None:
    """Print parameters, FLOPs, memory, disk and time per device before anything runs."""
    from outrider.recipe import Recipe
    from outrider.training.plan import plan as make

    result = make(Recipe.load(recipe, overrides or []))
    if as_json:
        _print_json(result.dump())
        return
    _table(f"plan: {result.name}", [], [
        ("parameters", f"{count(result.parameters)} ({count(result.matmul_parameters)} in matrix products)"),
        ("tokens", f"{count(result.tokens)} in {result.steps:,} steps"
         + (f", {result.epochs:.2f} epochs" if result.epochs is not None else ", corpus not prepared yet")),
        ("FLOPs", f"{result.flops_per_token / 1e6:.1f} MFLOP/token (PaLM), {result.total_flops:.3g} in all"),
        ("memory", f"{size(result.state_bytes)} for weights, gradients and AdamW; "
                   f"about {size(result.activation_bytes)} of activations"),
        ("disk", f"{size(result.disk_bytes)} ({size(result.snapshot_bytes)} a snapshot)"),
        *((f"time on one {name}", f"{duration(seconds)} at {100 * result.assumed_mfu[name]:.0f} % of peak")
          for name, seconds in result.time_seconds.items()),
    ])


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    data: Annotated[Path, typer.Option(help="Corpus folder prepared with the model's tokenizer.")],
    split: Annotated[str, typer.Option(help="train or validation.")] = "validation",
    context: Annotated[int, typer.Option(help="Tokens a window predicts; 0: the model's, at most 1,024.")] = 0,
    tokens: Annotated[int, typer.Option(help="About how many tokens; 0: all.")] = 0,
    device: Device = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Score a model in bits per byte on held-out text."""
    from outrider.evaluation import evaluate_corpus

    if split not in ("train", "validation"):
        raise typer.BadParameter("use train or validation", param_hint="--split")
    result = evaluate_corpus(model, data, split=split, context=context, tokens=tokens, device=device)  # type: ignore[arg-type]
    if as_json:
        _print_json({"model": model, "data": str(data), "split": split, **vars(result)})
    else:
        print(f"{result.bits_per_byte:.4f} bits per byte, {result.loss:.4f} nats per token, "
              f"{count(result.tokens)} tokens")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="GGUF file, or llama2.c '.bin'.")],
    out: Annotated[Path, typer.Option(help="Model folder to make.")],
    tokenizer: Annotated[Optional[Path], typer.Option(help="Tokenizer to put in; default: the file's own.")] = None,  # noqa: UP045
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    force: Force = False,
) -> None:
    """Turn a GGUF or llama2.c model into a Hugging Face folder, dequantised."""
    from outrider.convert import convert as run

    with Display(f"convert {source.name}") as display:
        config = run(source, out, tokenizer=tokenizer, dtype=dtype, replace=force, watcher=display)
    console.print(f"{count(config.num_parameters)} parameters: {out}")


@app.command()
def generate(
    target: Annotated[str, typer.Option(help="Model folder or hub id.")],
    prompt: Annotated[Optional[str], typer.Argument(help="Text to continue; default: standard input.")] = None,  # noqa: UP045
    draft: Annotated[Optional[str], typer.Option(help="Folder of the small model that guesses ahead.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens at most.")] = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    width: Width = "auto",
    method: Method = "rejection",
    stop: Annotated[Optional[list[str]], typer.Option(help="End before this string; may be repeated.")] = None,  # noqa: UP045
    colour: Annotated[bool, typer.Option("--colour", "--color", help="Colour what the draft guessed right.")] = False,
    device: Device = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Continue a text, drafting with a small model if one is given. The words are the target's own."""
    from outrider.decoding import Decoder, Generation, Sampling

    text = prompt if prompt is not None else sys.stdin.read()
    sampling = Sampling(temperature, top_k, top_p, seed)
    decoder = Decoder.load(target, draft, device=device)
    result = Generation()
    rounds = decoder.stream(text, max_new_tokens=max_new_tokens, sampling=sampling, width=_width(width),
                            method=method, stop=stop or (), into=result)  # type: ignore[arg-type]
    if as_json:
        for _ in rounds:
            pass
        _print_json({"prompt": text, "text": result.text, "tokens": result.ids, "seed": result.seed,
                     "drafted": [token.drafted for token in result.tokens], "finish": result.finish,
                     "statistics": result.statistics.dump()})
        return
    _write_stream(text, rounds, decoder, result, colour, bool(stop))
    _show_statistics(result, draft is not None)


@bench_app.command("decode")
def bench_decode(
    target: Annotated[str, typer.Option(help="Model folder.")],
    draft: Annotated[str, typer.Option(help="Folder of the small model.")],
    prompts: Annotated[Path, typer.Option(
        help="'.jsonl[.gz|.zst]' with a field 'prompt', or text with a line '---' between prompts.")],
    json_out: Annotated[Optional[Path], typer.Option("--json", help="File to write the result to.")] = None,  # noqa: UP045
    limit: Annotated[int, typer.Option(help="Use only the first prompts; 0: all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens at most.")] = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    width: Width = "auto",
    method: Method = "rejection",
    repeats: Annotated[int, typer.Option(min=1, help="How often each prompt is decoded both ways.")] = 2,
    device: Device = "auto",
) -> None:
    """Decode with and without the draft, alternating; report speed, acceptance and whether outputs agree."""
    from outrider.benchmarks import benchmark_decode, read_prompts
    from outrider.decoding import Decoder, Sampling
    from outrider.files import write_json

    texts = read_prompts(prompts, limit)
    decoder = Decoder.load(target, draft, device=device)
    with Display("bench decode") as display:
        result = benchmark_decode(
            decoder, texts, max_new_tokens=max_new_tokens, sampling=Sampling(temperature, top_k, top_p, seed),
            width=_width(width), method=method, repeats=repeats, watcher=display,  # type: ignore[arg-type]
            settings={"target": target, "draft": draft, "prompts": str(prompts)})
    if json_out is not None:
        write_json(json_out, result.dump())
    _table("decoding", ["", "alone", "with the draft"], benchmark_rows(result))


@bench_app.command("data")
def bench_data(
    source: Annotated[str, typer.Argument(help="As for 'data prepare'.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json or .model.")],
    text_field: Annotated[str, typer.Option()] = "text",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Compare 'data prepare' with the bare tokenizer on the same text; print JSON."""
    from outrider.benchmarks.tokenise import benchmark_prepare
    from outrider.corpus import Source

    _print_json(benchmark_prepare(Source(source, text_field), tokenizer, repeats))


@bench_app.command("gpu")
def bench_gpu(
    out: Annotated[Path, typer.Option(help="Folder for the JSON result.")] = Path("benchmarks/results"),
    device: Device = "auto",
    small: Annotated[bool, typer.Option("--small", help="Tiny shapes, to try the benchmark itself.")] = False,
) -> None:
    """Decode and train benchmarks of an accelerator; says so and succeeds where there is none."""
    from outrider.benchmarks.accelerator import benchmark_accelerator

    path = benchmark_accelerator(out, device, small=small)
    console.print(f"results: {path}" if path else "no accelerator here: nothing measured")


@app.command()
def report(
    runs: Annotated[Optional[list[Path]], typer.Argument(help="Run folders.")] = None,  # noqa: UP045
    bench: Annotated[Optional[list[Path]], typer.Option(help="JSON of 'bench decode'; may be repeated.")] = None,  # noqa: UP045
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option()] = "Outrider report",
) -> None:
    """Write one self-contained HTML page: loss curves, acceptance, speed, samples."""
    from outrider.benchmarks import write_report

    console.print(f"report: {write_report(out, list(runs or []), list(bench or []), title)}")


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("quickstart"),
    minutes: Annotated[float, typer.Option(min=0.1, help="Time to stay within; training shrinks to fit.")] = 5.0,
) -> None:
    """See the whole workflow in minutes: data, training, fine-tuning, scores, faster decoding, report."""
    from outrider.quickstart import run

    result = run(out, minutes=minutes)
    _table("what was measured", [], result.rows)
    console.print("[bold]Try next[/bold]")
    for command in result.next_commands:
        console.print(f"  {command}", soft_wrap=True, markup=False)


@app.command()
def doctor(
    fast: Annotated[bool, typer.Option("--fast", help="Leave out the speed check.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Show devices, threads, torch's build, extras, free disk and speed, and what to fix."""
    from outrider.doctor import diagnose

    found = diagnose(speed=not fast)
    if as_json:
        _print_json(found.dump())
        return
    units = {"flops": (1e9, "GFLOP/s"), "bytes": (1e9, "GB/s"), "tokens": (1, "tokens/s")}
    _table("doctor", [], [
        ("outrider", found.outrider), ("torch", f"{found.torch} ({found.build} build)"),
        *(("device", device) for device in found.devices),
        ("cores, threads", f"{found.cores}, {found.threads}"),
        ("memory", size(found.memory) if found.memory else "unknown"), ("free disk", size(found.free_disk)),
        *((f"extra [{name}]".replace("[", r"\["), "installed" if not missing else f"lacks {', '.join(missing)}")
          for name, missing in found.extras.items()),
        *((name.rpartition("_")[0].replace("_", " ") + " speed", f"{value / divisor:,.0f} {unit}")
          for name, value in found.speed.items() for divisor, unit in (units[name.rpartition("_")[2]],)),
    ])
    for line in found.advice or ["nothing to fix"]:
        console.print(f"-> {line}", soft_wrap=True, markup=False)


def benchmark_rows(result: Any) -> list[tuple[str, str, str]]:
    """Return the table of a decode benchmark: what, alone, with the draft."""
    draft = result.draft
    same = f"{result.identical} of {len(result.prompts)}" if result.comparable else "sampled: same law"
    rate = f"{100 * draft.acceptance_rate:.1f} %" if draft.acceptance_rate is not None else "none drafted"
    return [
        ("tokens/s", f"{result.plain.tokens_per_second:.1f}", f"{draft.tokens_per_second:.1f}"),
        ("speed-up", "", f"{result.speedup:.2f}x"),
        ("identical output", "", same),
        ("acceptance rate", "", rate),
        ("mean accepted length", "1", f"{draft.mean_accepted_length:.2f}"),
        ("target passes", f"{result.plain.target_passes}", f"{draft.target_passes}"),
        ("time in draft, target", "", f"{draft.draft_seconds:.2f} s, {draft.target_seconds:.2f} s"),
    ]


def _width(text: str) -> Any:
    if text == "auto" or (text.isascii() and text.isdigit()):
        return text if text == "auto" else int(text)
    raise DecodingError(f"--width takes a whole number or 'auto', not '{text}'")


def _write_stream(prompt: str, rounds: Any, decoder: Any, result: Any, colour: bool, has_stop: bool) -> None:
    """Print text as it is settled; with stop strings, at the end, as they may cut what came before."""
    from rich.console import Console

    out = Console(highlight=False, soft_wrap=True, force_terminal=True if colour else None)
    stream, shown = decoder.tokenizer.stream(decoder.tokenizer.encode(prompt)), 0
    for number, tokens in enumerate(rounds):
        if number == 0:  # not before: a request that is refused prints nothing
            out.print(prompt, end="", markup=False)
        if colour:
            for token in tokens:
                out.print(stream.feed(token.id), end="", markup=False, style="green" if token.drafted else None)
        elif not has_stop:
            out.print(result.text[shown:], end="", markup=False)
            shown = len(result.text)
    out.print(result.text[shown:] if has_stop and not colour else "", markup=False)


def _show_statistics(result: Any, drafting: bool) -> None:
    statistics = result.statistics
    line = f"{statistics.generated} tokens, {statistics.tokens_per_second:.1f} tokens/s"
    if drafting and statistics.drafted:
        line += (f", {statistics.accepted} of {statistics.drafted} drafted tokens accepted, "
                 f"{statistics.mean_accepted_length:.2f} tokens a pass")
    elif drafting:
        line += ", drafting did not pay and stayed off"
    console.print(line + (f", seed {result.seed}" if result.seed is not None else ""))


def _show_manifest(manifest: Any, folder: Path) -> None:
    rows = [(source.spec, f"{source.documents:,}", size(source.bytes), count(source.tokens))
            for source in manifest.sources]
    rows += [(f"= {split}", f"{total.documents:,}", size(total.bytes), count(total.tokens))
             for split, total in manifest.splits.items()]
    _table(str(folder), ["source", "documents", "text", "tokens"], rows)


def _table(title: str, head: list[str], rows: Any) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(head), box=None, pad_edge=False)
    for index in range(max(len(row) for row in rows)):
        table.add_column(head[index] if head else "", justify="left" if index == 0 or not head else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def main() -> None:
    """Run the command line. Exit codes: 2 for a mistake in the input, 128 + n after signal n."""
    try:
        app()
    except OutriderError as error:
        if "--debug" in sys.argv:
            raise
        console.print(f"[bold red]error:[/bold red] {_plain(str(error))}", soft_wrap=True)
        sys.exit(128 + error.signal_number if isinstance(error, Interrupted) else 2)
    except KeyboardInterrupt:
        sys.exit(130)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))
