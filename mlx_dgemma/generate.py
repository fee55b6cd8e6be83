"""generate(), stream_generate() and the command `mlx_dgemma.generate`.

This module imports nothing heavy at its top: `--help` and `import mlx_dgemma` stay quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .command import run_command
from .config import GenerationConfig
from .errors import InputError, UsageError
from .response import Clock, GenerationResponse

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .decoding.diffusion import Block, Draft
    from .model import DiffusionGemma
    from .prompt import Prompt

DIFFUSION_OPTIONS = (
    "max_denoising_steps",
    "entropy_bound",
    "t_min",
    "t_max",
    "stability_threshold",
    "confidence_threshold",
)
AR_OPTIONS = ("temperature", "top_p", "top_k", "drafter", "draft_width")
MODES = ("diffusion",)
LARGEST_PREFILL_STEP = 4096  # above it MLX has had wrong results on long inputs


def generate(
    model: DiffusionGemma, tokenizer: TokenizerWrapper, prompt: Prompt, *, verbose: bool = False, **options: Any
) -> str:
    """The whole answer as text. Takes the options of `stream_generate`; `verbose` prints as it goes."""
    responses = stream_generate(model, tokenizer, prompt, **options)
    if verbose:
        from .display import show

        return show(responses, tokenizer)
    return "".join(response.text for response in responses)


def stream_generate(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    *,
    max_tokens: int | None = None,
    mode: str = "diffusion",
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    chat_template: bool = True,
    enable_thinking: bool = False,
    drafts: bool = False,
    prefill_step_size: int | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    draws: Any = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Yield a response per finished canvas (and, with `drafts`, one per denoising step).

    Args:
        prompt: text, token ids, or chat messages.
        max_tokens: new ids at most; default: the checkpoint's max_new_tokens.
        mode: "diffusion", the reference sampler.
        seed: fixes every random draw.
        stop: strings that end the answer.
        chat_template: False encodes a string plainly.
        enable_thinking: let the model think first; its thoughts come as `reasoning`.
        prefill_step_size: prompt tokens per forward, at most 4,096 (default 2,048).
        prompt_progress_callback: called with (tokens done, tokens in all).
        draws: recorded draws in place of the seed's (`draws.RecordedDraws`).
        options: max_denoising_steps, entropy_bound, t_min, t_max, stability_threshold,
            confidence_threshold; defaults come from the checkpoint.

    Raises:
        InputError: a prompt that cannot be continued. UsageError: an option that cannot be.
    """
    # Checked here rather than in the generator below, so that errors come with the call.
    check_options(mode, options)
    check_limits(max_tokens, prefill_step_size, seed)
    from .decoding.diffusion import check_prompt
    from .decoding.prefill import PREFILL_STEP
    from .draws import Draws
    from .memory import require_room
    from .prompt import encode_prompt

    config = model.generation_config.replace(max_new_tokens=max_tokens, **options)
    step = PREFILL_STEP if prefill_step_size is None else prefill_step_size
    ids = encode_prompt(tokenizer, prompt, chat_template=chat_template, enable_thinking=enable_thinking)
    check_prompt(model, ids)
    stop = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stop, Sequence) or not all(isinstance(string, str) for string in stop):
        raise UsageError(f"stop must be a string or a list of strings, not {stop!r:.80}")
    require_room(model, len(ids) + config.max_new_tokens)
    draws = Draws([seed], model.config.vocab_size) if draws is None else draws
    return _stream(model, tokenizer, ids, config, draws, stop, drafts, step, prompt_progress_callback)


def _stream(model, tokenizer, ids, config, draws, stop, drafts, step, progress) -> Iterator[GenerationResponse]:
    from mlx_lm.generate import wired_limit

    from .decoding.diffusion import Counts, Draft, decode
    from .transcript import Transcript

    transcript, counts = Transcript(tokenizer, stop), Counts()
    clock = Clock(len(ids), counts)
    with wired_limit(model):
        for event in decode(
            model, ids, config, draws, counts=counts, prefill_step=step, progress=clock.watch(progress)
        ):
            if isinstance(event, Draft):
                if drafts:
                    yield _draft(event, tokenizer, clock)
                continue
            yield _final(event, transcript, clock)
            if transcript.stopped:
                return


def _draft(event: Draft, tokenizer: TokenizerWrapper, clock: Clock) -> GenerationResponse:
    tokens = event.frame.best[0].tolist()
    return GenerationResponse(
        is_draft=True,
        draft_text=tokenizer.decode(tokens),
        draft_tokens=tuple(tokens),
        draft_accepted=tuple(event.frame.accepted[0].tolist()),
        draft_step=event.frame.step,
        canvas_index=event.canvas_index,
        **clock.readings(),
    )


def _final(event: Block, transcript: Any, clock: Clock) -> GenerationResponse:
    piece = transcript.add(event.tokens)
    text, reasoning, reason = piece.text, piece.reasoning, event.finish_reason
    if transcript.stopped:
        reason = "stop"
    elif reason is not None:
        rest = transcript.finish()
        text, reasoning = text + rest.text, reasoning + rest.reasoning
    clock.generated += len(event.tokens)
    return GenerationResponse(
        text=text,
        reasoning=reasoning,
        token=event.tokens[-1],
        tokens=tuple(event.tokens),
        finish_reason=reason,
        canvas_index=event.canvas_index,
        **clock.readings(),
    )


def check_options(mode: str, options: dict[str, Any]) -> None:
    """Raise UsageError for a mode or option that does not exist, or an option of the other mode."""
    if mode not in MODES:
        raise UsageError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    for name, value in options.items():
        if name in AR_OPTIONS and value is not None:
            raise UsageError(f"{name} is an option of ar mode; diffusion has {', '.join(DIFFUSION_OPTIONS)}")
        if name not in DIFFUSION_OPTIONS + AR_OPTIONS:
            raise UsageError(f"{name} is not an option; diffusion has {', '.join(DIFFUSION_OPTIONS)}")


def check_limits(max_tokens: int | None, prefill_step_size: int | None, seed: int) -> None:
    """Raise UsageError for numbers that no checkpoint makes right."""
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise UsageError(f"max_tokens must be a whole number greater than 0, not {max_tokens!r}")
    step = prefill_step_size
    if step is not None and (type(step) is not int or not 1 <= step <= LARGEST_PREFILL_STEP):
        raise UsageError(f"prefill_step_size must lie in 1-{LARGEST_PREFILL_STEP}, not {step!r}")
    if type(seed) is not int:
        raise UsageError(f"seed must be a whole number, not {seed!r}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command `mlx_dgemma.generate`."""
    run_command(_command, argument_parser(), argv)


def argument_parser() -> argparse.ArgumentParser:
    """Flags are spelled as in mlx_lm where it has them."""
    parser = argparse.ArgumentParser(
        prog="mlx_dgemma.generate",
        description="Answer a prompt with DiffusionGemma by denoising canvases.",
    )
    add = parser.add_argument
    add("--model", default="nano", help='a folder, a Hub id, or "nano", which comes with the package (default: nano)')
    add("--revision", help="of the Hub repository (default: its main branch)")
    add("--prompt", "-p", required=True, help='what to answer; "-" reads standard input')
    add("--system-prompt", help="a system turn before the prompt (default: none)")
    add("--ignore-chat-template", action="store_true", help="encode the prompt plainly (default: use the template)")
    add("--enable-thinking", action="store_true", help="let the model think first (default: off)")
    add("--max-tokens", "-m", type=int, help="new tokens at most (default: the checkpoint's, else 256)")
    add("--stop", action="append", default=[], metavar="STRING", help="end the answer before this; may be repeated")
    add("--mode", default="diffusion", help="diffusion: the reference sampler (default: diffusion)")
    add("--seed", type=int, default=0, help="of every random draw (default: 0)")
    group = parser.add_argument_group("diffusion mode; defaults are the checkpoint's, else the reference's")
    add = group.add_argument
    add("--max-denoising-steps", type=int, help="passes per canvas at most (48)")
    add("--entropy-bound", type=float, help="nats of entropy accepted per step (0.1)")
    add("--t-min", type=float, help="temperature after the last step (0.4)")
    add("--t-max", type=float, help="temperature before the first step (0.8)")
    add("--stability-threshold", type=int, help="equal canvases in a row, beyond the first, to stop (1)")
    add("--confidence-threshold", type=float, help="mean entropy in nats below which to stop (0.005)")
    group = parser.add_argument_group("ar mode")
    add = group.add_argument
    add("--temp", type=float, dest="temperature", help="not an option of diffusion mode")
    add("--top-p", type=float, help="not an option of diffusion mode")
    add("--top-k", type=int, help="not an option of diffusion mode")
    group = parser.add_argument_group("running and showing")
    add = group.add_argument
    add("--prefill-step-size", type=int, help="prompt tokens per forward, at most 4096 (default: 2048)")
    add("--show-denoising", action="store_true", help="show the canvas settling (default: off)")
    add("--verbose", type=_boolean, default=True, metavar="T/F", help="print statistics (default: T)")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def _boolean(text: str) -> bool:
    if text.lower() not in ("t", "true", "f", "false"):
        raise argparse.ArgumentTypeError(f"must be T or F, not {text!r}")
    return text.lower().startswith("t")


def _command(args: argparse.Namespace) -> None:
    options = {name: getattr(args, name) for name in (*DIFFUSION_OPTIONS, "temperature", "top_p", "top_k")}
    check_options(args.mode, options)
    # what is out of range whatever the checkpoint is said before it is loaded
    check_limits(args.max_tokens, args.prefill_step_size, args.seed)
    alone = ("t_min", "t_max") if None in (args.t_min, args.t_max) else ()  # their order is the checkpoint's matter
    GenerationConfig().replace(**{name: value for name, value in options.items() if name not in alone})
    if args.ignore_chat_template and (args.system_prompt or args.enable_thinking):
        raise UsageError("--ignore-chat-template leaves no place for --system-prompt or --enable-thinking")
    try:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        prompt.encode()  # bytes that are no text may have been let through
    except UnicodeError as error:
        raise InputError(f"the prompt is not text ({error})") from None
    if not prompt.strip():
        raise UsageError("--prompt is empty; give it some text")
    if args.system_prompt:
        prompt = [{"role": "system", "content": args.system_prompt}, {"role": "user", "content": prompt}]

    from .display import prefill_bar, show
    from .loading import load

    model, tokenizer = load(args.model, revision=args.revision)
    responses = stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=args.max_tokens,
        mode=args.mode,
        seed=args.seed,
        stop=args.stop,
        chat_template=not args.ignore_chat_template,
        enable_thinking=args.enable_thinking,
        drafts=args.show_denoising,
        prefill_step_size=args.prefill_step_size,
        prompt_progress_callback=prefill_bar(),
        **options,
    )
    show(responses, tokenizer, verbose=args.verbose, denoising=args.show_denoising)


if __name__ == "__main__":
    main()
