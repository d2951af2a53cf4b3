"""The table of subcommands: each parses its arguments, calls one function of the package that does the work, and
prints what comes back. PyTorch and the like are imported only inside a subcommand, so that help comes at once.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup, TyperOption

from benthic import __version__, console, torchrun
from benthic.errors import InputError, WorkFailed

if TYPE_CHECKING:
    from benthic.config.schema import ModelConfig, RunConfig
    from benthic.evaluate.held_out import HeldOut
    from benthic.evaluate.score import Score
    from benthic.evaluate.task_files import Task
    from benthic.precision.latents import CachePrecision
    from benthic.precision.quantise import Precision

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class _Group(TyperGroup):
    """A group of commands whose ``--help`` is a plain False where it is not given: for a missing one typer imports
    pydantic, a tenth of a second, before it shows any command's help.
    """

    def get_help_option(self, ctx: Any) -> TyperOption | None:
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option


app = typer.Typer(
    cls=_Group,
    help="Train, talk to and measure DeepSeek-V3-style models on the hardware you have.",
    epilog="Begin with: benthic run --out runs/quickstart",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
bench = typer.Typer(
    cls=_Group,
    help="Measure speed here, as a share of what this machine can do at best.",
    epilog="Example: benthic bench train --json", no_args_is_help=True,
)  # fmt: skip
app.add_typer(bench, name="bench")

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a recipe of Benthic's own.")]
AtRest = Literal["fp32", "bf16", "fp8", "int8", "int4"]
CacheAtRest = Literal["fp32", "bf16", "fp8"]
Kept = Annotated[AtRest | None, typer.Option("--precision", help="That weights are kept in; by default their own.")]
Cached = Annotated[
    CacheAtRest | None,
    typer.Option("--cache-precision", help="That latents are cached in; by default as the weights are stored."),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run, or an exported or Hugging Face model directory.")]


def _path(text: str) -> Path:
    if not text:
        raise typer.BadParameter("must not be empty")
    return Path(text)


def _directory(text: str) -> Path:
    path = _path(text)
    there = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    if there.exists() and not there.is_dir():
        raise typer.BadParameter(f"{there} is a file; give a directory", param_hint="'--out'")
    return path


Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="The directory to write.", parser=_directory)]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting over the recipe's; repeatable.")
]
From = Annotated[Path, typer.Option("--from", metavar="RUN", help="The run or model directory to begin with.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]


def main() -> NoReturn:
    """Runs the command line; a user's mistake becomes one line and exit status 2."""
    console.write_any_text()
    with console.mistakes_in_one_line():
        try:
            status = app(standalone_mode=False)
        except typer.Abort:
            sys.exit(INTERRUPTED)
        except typer.TyperException as error:
            console.fail(error.format_message(), error.exit_code)
    if status == INTERRUPTED:  # how typer tells of Ctrl-C
        print("stopped by Ctrl-C", file=sys.stderr)
    sys.exit(status)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"benthic {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command(epilog="Example: benthic run quickstart --out runs/quickstart --set train.minutes=5")
def run(
    out: Out, recipe: Recipe = "quickstart", set_: Set = None,
    skip: Annotated[
        str, typer.Option("--skip", metavar="STAGES", help="Stages to leave out, as in --skip rl,export.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the stages, their time and cost; write nothing.")
    ] = False,
) -> None:  # fmt: skip
    """Every stage, from raw text to a model that is measured and exported; run it again to resume."""
    from benthic.config.load import load_run_config
    from benthic.run import whole

    config = load_run_config(recipe, set_ or ())
    plan = whole.plan(config, out, [name.strip() for name in skip.split(",") if name.strip()])
    if torchrun.rank() and not dry_run:
        whole.assist(plan, out)
    if torchrun.rank():
        return
    if dry_run:
        console.print_forecast(whole.rows(plan, out), config.train.price_per_hour)
        return
    outcome = whole.run(plan, out)
    console.print_evaluations(outcome.records)
    print(whole.in_words(out, outcome))
    if outcome.failed:
        raise WorkFailed("; ".join(outcome.failed) + "; all else is done, and the same command tries again")


@app.command(epilog="Example: benthic data notes/ chats.jsonl --out runs/mine --set model.vocab_size=8192")
def data(
    sources: Annotated[list[str], typer.Argument(metavar="RECIPE|FILES...", help="A recipe, or text to train on.")],
    out: Out, set_: Set = None, json_: Json = False,
) -> None:  # fmt: skip
    """Turn a corpus into a tokenizer, token shards and a manifest."""
    from benthic.config.load import DEFAULT_RECIPE, load_data_config, recipe_among
    from benthic.data.manifest import FILE_NAME
    from benthic.data.prepare import damage, prepare

    config = load_data_config(sources, set_ or ())
    damaged = damage(out) if (out / "data" / FILE_NAME).exists() else None
    with console.counting() as progress:
        manifest = prepare(config.data, config.model.vocab_size, out, progress, repair=damaged is not None)
    console.print_notes([f"repaired: {damaged}"] if damaged else [])
    console.print_notes(manifest.remarks())
    keys = ("documents", "tokens", "bytes", "rejected", "duplicates", "train_tokens", "val_tokens")
    _print({key: getattr(manifest, key) for key in keys}, json_)
    if not json_:
        again = [argument for setting in set_ or () for argument in ("--set", setting)]
        command = ["benthic", "train", recipe_among(sources) or DEFAULT_RECIPE, "--out", str(out), *again]
        print(f"to train on it: {shlex.join(command)}")


@app.command(epilog="Example: benthic train quickstart --out runs/quickstart --set train.steps=200")
def train(
    recipe: Recipe,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The directory to write.", parser=_directory)
    ] = None,
    set_: Set = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what each rank of the job would hold and send.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="Of a dry run: whose memory it is to fit; H800.")
    ] = None,
    json_: Json = False,
) -> None:
    """Pretrain, and extend the context, on data that `benthic data` has prepared in --out; run it again to resume."""
    from benthic.config.load import load_run_config
    from benthic.config.posttrain import PosttrainConfig

    config = load_run_config(recipe, set_ or ()).model_copy(update={"posttrain": PosttrainConfig()})
    if dry_run:
        _print_dry_run(config, gpu, json_)
        return
    if gpu is not None or json_:
        raise InputError(f"{'--json' if gpu is None else f'--gpu {gpu}'}: is for --dry-run")
    if out is None:
        raise InputError("--out DIR: is missing; it is where `benthic data` has prepared the recipe's data")
    _refuse_other_data(config, set_ or (), out)
    _train(config, out)


def _print_dry_run(config: "RunConfig", gpu: str | None, json_: bool) -> None:
    from benthic.config.stages import stages
    from benthic.plan.hardware import gpu_named
    from benthic.train.dry_run_report import report_json, report_lines

    first, there = stages(config)[0].config, gpu_named(gpu or "H800")
    if json_:
        console.print_json(report_json(first, there))
    else:
        console.print_lines(report_lines(first, there))


@app.command(epilog="Example: benthic sft chats.toml --out runs/assistant --from runs/quickstart")
def sft(recipe: Recipe, out: Out, from_: From, set_: Set = None) -> None:
    """Fine-tune a model on the answers in conversations, posttrain.sft of a recipe; run it again to resume."""
    _posttrain("sft", recipe, out, from_, set_)


@app.command(epilog="Example: benthic rl sums.toml --out runs/reasoner --from runs/assistant")
def rl(recipe: Recipe, out: Out, from_: From, set_: Set = None) -> None:
    """Let a model learn from rewards (GRPO), posttrain.rl of a recipe; run it again to resume."""
    _posttrain("rl", recipe, out, from_, set_)


@app.command(epilog="Example: benthic problems sums.toml --out problems --count 1000")
def problems(
    recipe: Recipe, out: Out, set_: Set = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Problems of each source with their answers.")] = 1000,
) -> None:  # fmt: skip
    """Write problems of posttrain.rl with answers, to fine-tune on first, and task files of those held out."""
    from benthic.config.load import load_posttrain_config
    from benthic.config.presets import PRESETS
    from benthic.posttrain.problem_files import write_problems

    config = load_posttrain_config(recipe, set_ or (), "", PRESETS["tiny"], "rl")
    assert config.posttrain.rl is not None
    for path in write_problems(config.posttrain.rl, out, count):
        print(path)


@app.command(epilog="Example: benthic distil teacher.toml --out answers")
def distil(recipe: Recipe, out: Out, set_: Set = None, json_: Json = False) -> None:
    """Sample a teacher's answers, posttrain.distil of a recipe, and keep the good ones to fine-tune on; run it again
    to resume.
    """
    from benthic import api
    from benthic.config.load import load_posttrain_config
    from benthic.config.presets import PRESETS
    from benthic.posttrain.distil import ANSWERS

    config = load_posttrain_config(recipe, set_ or (), "", PRESETS["tiny"], "distil").posttrain.distil
    assert config is not None
    with console.counting() as progress:
        found = api.distil(config, out, progress)
    if json_:
        console.print_json(found)
        return
    left_out = "".join(f", {count} {reason}" for reason, count in found["left_out"].items())
    print(f"{out / ANSWERS}: {found['kept']} of {found['asked']} answers{left_out}")
    if found["without_answer"]:
        print(f"{found['without_answer']} got no answer; the same command asks for them again")


@app.command(epilog="Example: benthic reward preferences.toml --out runs/judge --from runs/assistant")
def reward(recipe: Recipe, out: Out, from_: From, set_: Set = None) -> None:
    """Train a reward model on pairs of answers, posttrain.reward of a recipe; run it again to resume."""
    _refuse_several_processes()
    from benthic.api import train_reward_model

    trained = train_reward_model(_posttrain_config("reward", recipe, out, from_, set_), out)
    print(
        f"{out}: {trained.bits_per_byte:.4f} {trained.measure}; to learn from it, name {out} among a recipe's rewards"
    )


def _refuse_several_processes() -> None:
    if torchrun.processes() > 1:
        raise InputError(
            f"{torchrun.processes()} processes were started; several can do `benthic run`, and `benthic train` after "
            "`benthic data`"
        )


def _posttrain(stage: Literal["sft", "rl"], recipe: str, out: Path, base: Path, set_: list[str] | None) -> None:
    _refuse_several_processes()
    _prepare_and_train(_posttrain_config(stage, recipe, out, base, set_), out)


def _posttrain_config(stage: str, recipe: str, out: Path, base: Path, set_: list[str] | None) -> "RunConfig":
    from benthic.config.load import load_posttrain_config
    from benthic.convert.resolve import model_config

    if out.resolve() == base.resolve():
        raise InputError(f"--from {base}: is --out; give what is made of it a directory of its own")
    return load_posttrain_config(recipe, set_ or (), str(base.absolute()), model_config(base), stage)


@app.command("eval", epilog="Example: benthic eval runs/quickstart --tasks arithmetic.jsonl capitals.jsonl --json")
def evaluate(
    run: Run,
    more: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILES...]", help="Of --tasks, after its first.")
    ] = None,
    tasks: Annotated[
        list[Path] | None, typer.Option("--tasks", metavar="FILES...", help="Task files: see docs/evaluation.md.")
    ] = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option("--lm-eval", metavar="TASK", help="A task of lm-eval's, or its .yaml file.")
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also what xz -9e makes of the held-out text.")] = False,
    precision: Annotated[
        AtRest | None, typer.Option("--precision", help="Held-out text also with weights kept in this.")
    ] = None,
    cache_precision: Annotated[
        CacheAtRest | None, typer.Option("--cache-precision", help="Held-out text also with latents cached in this.")
    ] = None,
    json_: Json = False,
) -> None:  # fmt: skip
    """How good a model is, with 95% confidence intervals: bits per byte of the text its run has held out, or tasks."""
    from benthic.evaluate.task_files import read_tasks

    if more and not tasks:
        raise InputError(f"{more[0]}: what is it for? Task files come after --tasks")
    files = read_tasks([*(tasks or ()), *(more or ())])
    scores = _scores_of_tasks(run, files, lm_eval or ()) if files or lm_eval else {}
    besides = baseline or precision or cache_precision
    held_out = None if scores and not besides else _held_out(run, baseline, precision, cache_precision)
    if json_:
        own = held_out.scores if held_out else {}
        if both := own.keys() & scores.keys():
            raise InputError(f"{min(both)}: a task of this name is Benthic's own; rename the file")
        console.print_json({name: asdict(score) for name, score in (own | scores).items()})
        return
    for line in held_out.in_words() if held_out else ():
        print(line)
    console.print_scores(scores)


def _scores_of_tasks(run: Path, tasks: "Sequence[Task]", lm_eval: Sequence[str]) -> "dict[str, Score]":
    from benthic.convert.resolve import find_tokenizer, load_model
    from benthic.data.tokenizer import Tokenizer
    from benthic.evaluate.tasks import evaluate

    if lm_eval:
        from benthic.evaluate.harness import harness  # before the model is loaded: it tells which extra is missing
    tokenizer = Tokenizer.load(find_tokenizer(run))
    model, _ = load_model(run)
    with console.counting() as progress:
        scores = evaluate(model, tokenizer, tasks, progress)
        for name, score in (harness(model, tokenizer, lm_eval, progress) if lm_eval else {}).items():
            if name in scores:
                raise InputError(f"{name}: a task file and a task of lm-eval's have this name; rename the file")
            scores[name] = score
    return scores


def _held_out(
    run: Path, baseline: bool, precision: "Precision | None", cache_precision: "CachePrecision | None"
) -> "HeldOut":
    from benthic.convert.resolve import current_stage, load_model
    from benthic.data.shards import TokenStore
    from benthic.evaluate.held_out import held_out

    if run.is_dir() and not (run / "data").exists():
        raise InputError(
            f"{run}: holds no data/ to be measured on; give --tasks, or the directory of a run that was trained here"
        )
    model, _ = load_model(run)
    store = TokenStore(run / "data", "val")
    return held_out(
        model, store, current_stage(run)[0].config, baseline=baseline, precision=precision,
        cache_precision=cache_precision,
    )  # fmt: skip


@app.command(epilog="Example: benthic chat runs/quickstart --set inference.temperature=0.5")
def chat(run: Run, precision: Kept = None, cache_precision: Cached = None, set_: Set = None) -> None:
    """Talk to a model."""
    from benthic.api import Engine
    from benthic.config.load import section_settings
    from benthic.inference.chat import chat

    chat(Engine(run, precision=precision, cache_precision=cache_precision), **section_settings("inference", set_ or ()))


@app.command(epilog="Example: benthic generate runs/quickstart --prompt 'Once upon a time' --set inference.seed=1")
def generate(
    run: Run, prompt: Annotated[str, typer.Option("--prompt", help="Text to go on from.")],
    precision: Kept = None, cache_precision: Cached = None, set_: Set = None, json_: Json = False,
) -> None:  # fmt: skip
    """Let a model continue a text."""
    from benthic.api import Engine
    from benthic.config.load import section_settings

    engine = Engine(run, precision=precision, cache_precision=cache_precision)
    sampling = section_settings("inference", set_ or ())
    engine.settings(**sampling)
    if json_:
        console.print_json(asdict(engine.generate(prompt, **sampling)[0]))
    else:
        console.print_stream(engine.stream(prompt, **sampling))


@app.command(epilog="Example: benthic serve runs/quickstart --port 8000")
def serve(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME=]RUN...", help="Runs, or exported or Hugging Face directories.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port; 8000. 0 takes any that is free.")] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", help="Ask for this key. BENTHIC_API_KEY keeps it out of listings.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML with serve settings.")] = None,
    precision: Kept = None,
    cache_precision: Cached = None,
    set_: Set = None,
) -> None:  # fmt: skip
    """Serve models over HTTP as OpenAI's API does, with a page to talk to them."""
    from benthic.config.load import load_serve_config

    flags = {"host": host, "port": port, "precision": precision, "cache_precision": cache_precision}
    given = [f"serve.{key}={value}" for key, value in flags.items() if value is not None]
    settings = load_serve_config(config, [*(set_ or ()), *given])

    from benthic.serve import server  # first: it tells which extra is missing
    from benthic.serve.models import name_models

    server.serve(name_models(runs or (), settings.models), settings, api_key)


@app.command("import", epilog="Example: benthic import downloads/moonlight --out runs/moonlight")
def import_(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A DeepseekV3ForCausalLM directory.")], out: Out,
) -> None:  # fmt: skip
    """Make a run of a Hugging Face model directory, FP8 or not."""
    from benthic.convert.runs import import_run

    imported = import_run(source, out)
    console.print_figures(imported._asdict())
    print(
        f"to talk to it: benthic chat {out}" if imported.tokenizer else "without tokenizer.json it cannot be talked to"
    )


@app.command(epilog="Example: benthic export runs/quickstart --format gguf --precision q8_0 --out quickstart.gguf")
def export(
    run: Run,
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="The directory (hf) or file (gguf) to write.",
                                      parser=_path)],
    format_: Annotated[str, typer.Option("--format", metavar="hf|gguf",
                                         help="The layout: Hugging Face, or GGUF for llama.cpp.")] = "hf",
    precision: Annotated[str | None, typer.Option(
        "--precision", metavar="TYPE", help="Of a gguf file: f32, f16, bf16, q8_0, q4_0; else as stored.")] = None,
) -> None:  # fmt: skip
    """Write a model as other programs read it: transformers, vLLM, SGLang, or llama.cpp."""
    if format_ not in ("hf", "gguf"):
        raise InputError(f"--format {format_}: must be hf or gguf")
    if format_ == "hf":
        from benthic.convert.runs import export_hf

        if precision is not None:
            raise InputError(f"--precision {precision}: is for --format gguf; hf keeps the model's own dtype")
        export_hf(run, _directory(str(out)))
    else:
        from benthic.convert.gguf import export_gguf, precision_named

        for remark in export_gguf(run, out, precision_named(precision)).remarks:
            print(remark)
    print(f"wrote {out}")


@app.command(epilog="Example: benthic report runs/quickstart")
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")], json_: Json = False) -> None:
    """One page of all that is known of a run: curves, evaluation, samples, data, cost; RUN/report.html."""
    from benthic.api import write_report

    path, facts = write_report(run)
    console.print_notes(facts.damaged)
    if json_:
        console.print_json({"report": str(path), **facts.figures()})
    else:
        print(f"the report is {path}")


@app.command(epilog="Example: benthic plan v3-671b --gpus 2048 --gpu H800 --json")
def plan(
    name: Annotated[str, typer.Argument(metavar="PRESET|RECIPE", help="A model preset, or a recipe.")],
    set_: Set = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="How many; by default as many as the recipe's parallel section says."),
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", metavar="NAME", help="Of which kind.")] = "H800",
    json_: Json = False,
) -> None:
    """A model's parameters, arithmetic and cache; its training's memory, time, money and energy."""
    from benthic.config.load import load_preset_or_recipe
    from benthic.plan.hardware import gpu_named
    from benthic.train.planned import plan

    there = gpu_named(gpu)
    # Who asks for so many GPUs asks for a training, of which a preset says nothing.
    config = load_preset_or_recipe(name, set_ or (), prefer_recipe=gpus is not None)
    result = plan(config, gpus=gpus, gpu=there)
    if json_:
        console.print_json(asdict(result))
    else:
        console.print_plan(result)


@app.command(epilog="Example: benthic timeline dualpipev --ranks 4 --micro-batches 10 --svg dualpipev.svg")
def timeline(
    schedule: Annotated[
        Literal["1f1b", "zb1p", "interleaved", "zbv", "dualpipev"],
        typer.Argument(metavar="SCHEDULE", help="1f1b, zb1p, interleaved, zbv or dualpipev."),
    ],
    ranks: Annotated[int, typer.Option(min=2, max=64, help="Processes of the pipeline.")] = 4,
    micro_batches: Annotated[int, typer.Option(min=1, max=512, help="Of a step.")] = 8,
    times: Annotated[
        str, typer.Option(metavar="F,I,W", help="A stage's forward pass, backward pass of inputs, of weights.")
    ] = "1,1,1",
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it here.", parser=_path)] = None,
    json_: Json = False,
) -> None:  # fmt: skip
    """What each process of a pipeline does in a step, and how much of the time none has work."""
    from benthic.parallel.show import show

    shown = show(schedule, ranks, micro_batches, times)
    if svg is not None:
        from benthic.files import write_atomically

        write_atomically(svg, shown.svg)
    if json_:
        console.print_json(shown.figures)
    else:
        print(shown.text)


@bench.command("stages", epilog="Example: benthic bench stages my.toml --set parallel.pipeline=4 --json")
def bench_stages(recipe: Recipe, set_: Set = None, json_: Json = False) -> None:
    """What a recipe's layers, embedding and head cost here, and where that cuts it into the stages of its pipeline."""
    from benthic.config.load import load_run_config
    from benthic.lab.bench_stages import bench_stages

    _print(asdict(bench_stages(load_run_config(recipe, set_ or ()))), json_)


@bench.command("train", epilog="Example: benthic bench train --set model.preset=nano --json")
def bench_train(set_: Set = None, json_: Json = False) -> None:
    """Optimizer steps of bench-108m, 8 sequences of 512 tokens."""
    from benthic.config.load import load_run_config
    from benthic.lab.bench_train import bench_train
    from benthic.plan.memory import refuse_too_large

    config = load_run_config("bench", set_ or ())
    refuse_too_large(config.model)
    _print(asdict(bench_train(config)), json_)


Prompt = Annotated[int, typer.Option("--context", min=1, help="Tokens of each prompt.")]
Before = Annotated[int, typer.Option("--context", min=0, help="Tokens before the first that is decoded.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences at a time.")]
Arithmetic = Annotated[Literal["fp32", "bf16"], typer.Option("--precision", help="Of weights, cache and arithmetic.")]


@bench.command("prefill", epilog="Example: benthic bench prefill --context 2048 --json")
def bench_prefill(
    context: Prompt = 512, batch: Batch = 1, precision: Arithmetic = "fp32", set_: Set = None, json_: Json = False
) -> None:
    """Reading prompts with bench-400m, against the rate of a matrix product."""
    from benthic.lab.bench_inference import bench_prefill

    model = _model_to_measure(set_ or (), context, batch, precision)
    _print(asdict(bench_prefill(model, context=context, batch=batch, precision=precision)), json_)


@bench.command("decode", epilog="Example: benthic bench decode --context 2048 --json")
def bench_decode(
    context: Before = 128, batch: Batch = 1,
    precision: Annotated[AtRest, typer.Option("--precision", help="In which weights are kept.")] = "fp32",
    cache_precision: Annotated[
        CacheAtRest | None, typer.Option("--cache-precision", help="In which latents are cached; as the weights' type.")
    ] = None,
    set_: Set = None, json_: Json = False,
) -> None:  # fmt: skip
    """Writing token by token with bench-400m, against the rate of reading memory."""
    from benthic.lab.bench_inference import bench_decode

    model = _model_to_measure(set_ or (), context, batch, precision)
    speed = bench_decode(model, context=context, batch=batch, precision=precision, cache_precision=cache_precision)
    _print(asdict(speed), json_)


def _model_to_measure(overrides: Sequence[str], context: int, batch: int, precision: str) -> "ModelConfig":
    """Of `bench prefill` and `decode`; refused if it and its cache exceed the memory."""
    from benthic.config.load import load_preset_or_recipe
    from benthic.plan.memory import refuse_too_large

    model = load_preset_or_recipe("bench-400m", overrides).model
    item_bytes = 2 if precision == "bf16" else 4
    cache = batch * context * model.num_hidden_layers * model.latent_dim * item_bytes
    refuse_too_large(model, doing="measuring", bytes_per_parameter=item_bytes, further_bytes=cache)
    return model


def _refuse_other_data(config: "RunConfig", overrides: Sequence[str], out: Path) -> None:
    """Data is prepared already: a setting given for this command, unlike the recipe's, must not go unheeded."""
    from benthic.config.load import override_keys
    from benthic.data.corpus import absolute_paths
    from benthic.data.manifest import Manifest

    prepared = Manifest.load(out / "data").prepared(config.data)
    both = absolute_paths(config.data), absolute_paths(prepared)
    for key in override_keys(overrides):
        section, _, name = key.partition(".")
        if section != "data":
            continue
        given, found = (getattr(settings, name) if name else settings for settings in both)
        if given != found:
            raise InputError(f"--set {key}: {out / 'data'} was prepared with {found!r}; choose another --out")


def _prepare_and_train(config: "RunConfig", out: Path) -> None:
    """Every stage; what the later ones need is made first, so that they do not fail for want of it hours later."""
    from benthic.api import prepare_posttraining

    with console.counting() as progress:
        remarks = prepare_posttraining(config, out, progress)
    console.print_notes(remarks)
    _train(config, out)


def _train(config: "RunConfig", out: Path) -> None:
    from benthic.api import train

    trained = train(config, out)
    if torchrun.rank() == 0:
        print(f"{out}: {trained.bits_per_byte:.4f} {trained.measure}; to talk to it: benthic chat {out}")


def _print(figures: dict[str, object], as_json: bool) -> None:
    if as_json:
        console.print_json(figures)
    else:
        console.print_figures(figures)
