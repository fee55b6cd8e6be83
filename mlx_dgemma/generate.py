"""generate(), stream_generate() and the command `mlx_dgemma.generate`.

This module imports nothing heavy at its top: `--help` and `import mlx_dgemma` stay quick.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import Parser, run_command
from .config import GenerationConfig
from .drafter import check as check_drafter
from .errors import InputError, UsageError
from .files import require_place
from .options import MODES, OF_A_DRAFTER, OF_THE_LOOP, check_bias, check_limits, check_options, sampler_options
from .prompt import check_text
from .response import Answer, GenerationResponse

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .drafter import Drafter
    from .model import DiffusionGemma
    from .prompt import Prompt


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
    prefill_step_size: int | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    draws: Any = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Yield a response per finished canvas, or in ar mode per token.

    Args:
        prompt: text, token ids, or chat messages.
        max_tokens: new ids at most; default: the checkpoint's max_new_tokens.
        mode: "diffusion", the reference sampler; "ar", token after token by the causal pass.
        seed: fixes every random draw.
        stop: strings that end the answer.
        chat_template: False encodes a string plainly.
        enable_thinking: let the model think first; its thoughts come as `reasoning`.
        prefill_step_size: prompt tokens per forward, at most 4,096 (default 2,048).
        prompt_progress_callback: called with (tokens done, tokens in all).
        draws: recorded draws in place of the seed's (`draws.RecordedDraws`).
        options: of the mode; defaults come from the checkpoint, then from the reference.
            diffusion: max_denoising_steps, entropy_bound, t_min, t_max, stability_threshold,
            confidence_threshold; drafts=True yields a response per denoising step too.
            ar: temperature (0: greedy), top_p, top_k (0: off), min_p, repetition_penalty,
            repetition_context_size, logit_bias {id: added}; drafter ("lookup", "canvas", "block:FOLDER",
            or an object, see `mlx_dgemma.drafter`), which changes how fast the same answer comes;
            draft_width, how many tokens it drafts (default: what costs least time here). Of the block
            drafter: drafter_bits, draft_head_bits (4 or 8: quantised), draft_vocab (ids it can draft:
            how many from 0 on, a list, or a JSON file).

    Raises:
        InputError: a prompt that cannot be continued. UsageError: an option that cannot be.
    """
    # Checked here rather than in the generator below, so that errors come with the call.
    check_options(mode, options)
    ours = {name: options.pop(name, None) for name in OF_THE_LOOP}
    check_limits(max_tokens, prefill_step_size, seed, ours["drafter"], ours["draft_width"])
    from .decoding.prefill import PREFILL_STEP, check_prompt
    from .drafter import make, memory
    from .draws import Draws
    from .memory import require_room
    from .prompt import encode_prompt

    config = model.generation_config.replace(max_new_tokens=max_tokens, **options)
    check_bias(config, model.config.vocab_size)
    drafter = make(ours["drafter"], model, **{name: ours[name] for name in OF_A_DRAFTER})
    step = PREFILL_STEP if prefill_step_size is None else prefill_step_size
    ids = encode_prompt(tokenizer, prompt, chat_template=chat_template, enable_thinking=enable_thinking)
    check_prompt(model, ids, room=model.config.canvas_length if mode == "diffusion" else 1)
    stop = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stop, Sequence) or not all(isinstance(string, str) for string in stop):
        raise UsageError(f"stop must be a string or a list of strings, not {stop!r:.80}")
    context = min(len(ids) + config.max_new_tokens, model.config.max_position_embeddings)
    require_room(model, context, memory(drafter, context))
    draws = Draws([seed], model.config.vocab_size) if draws is None else draws
    answer = Answer(tokenizer, stop, len(ids), mode, prompt_progress_callback)
    inputs = {"prompt": ids, "config": config, "draws": draws, "prefill_step": step}
    if mode == "diffusion":
        return _denoised(model, answer, bool(ours["drafts"]), inputs)
    return _written(model, answer, drafter, ours["draft_width"], inputs)


def _denoised(
    model: DiffusionGemma, answer: Answer, previews: bool, inputs: dict[str, Any]
) -> Iterator[GenerationResponse]:
    """Diffusion mode: a response per canvas and, if wanted, per step."""
    from mlx_lm.generate import wired_limit

    from .decoding.diffusion import Preview, decode

    with wired_limit(model):
        for event in decode(model, **inputs, counts=answer.counts, progress=answer.progress):
            if isinstance(event, Preview):
                if previews:
                    best, accepted = event.frame.best[0].tolist(), event.frame.accepted[0].tolist()
                    yield answer.draft(best, accepted, event.frame.step, event.canvas_index)
                continue
            yield answer.final(event.tokens, event.finish_reason, canvas_index=event.canvas_index)
            if answer.stopped:
                return


def _written(
    model: DiffusionGemma, answer: Answer, drafter: Drafter | None, width: int | None, inputs: dict[str, Any]
) -> Iterator[GenerationResponse]:
    """AR mode: a response per token."""
    from mlx_lm.generate import wired_limit

    from .decoding.causal import decode
    from .decoding.costs import CostTable
    from .decoding.width import Widths

    costs = CostTable.of(model) if drafter is not None else None
    tokens = decode(
        model,
        **inputs,
        drafter=drafter,
        widths=Widths(costs, width),
        counts=answer.counts,
        progress=answer.progress,
    )
    try:
        with wired_limit(model):
            for token in tokens:
                yield answer.final(
                    [token.id], token.finish_reason, from_draft=token.from_draft, logprobs=token.logprobs
                )
                if answer.stopped:
                    return
    finally:
        tokens.close()
        if costs is not None:
            costs.save()


def main(argv: Sequence[str] | None = None) -> None:
    """The command `mlx_dgemma.generate`."""
    run_command(_command, argument_parser(), argv)


def argument_parser() -> argparse.ArgumentParser:
    """Flags are spelled as in mlx_lm where it has them."""
    parser = Parser(
        prog="mlx_dgemma.generate",
        description="Answer a prompt with DiffusionGemma: by denoising canvases, or token after token (--mode ar).",
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
    modes = "diffusion: the reference sampler; ar: token after token by the causal pass (default: diffusion)"
    add("--mode", default="diffusion", help=modes)
    add("--seed", type=int, default=0, help="of every random draw (default: 0)")
    add_sampler_options(parser)
    group = parser.add_argument_group("running and showing")
    add = group.add_argument
    add("--show-denoising", action="store_true", help="diffusion mode: show the canvas settling (default: off)")
    add("--denoising-svg", type=Path, metavar="FILE", help="diffusion mode: an animated picture of it (default: none)")
    add("--prefill-step-size", type=int, help="prompt tokens per forward, at most 4096 (default: 2048)")
    add("--verbose", type=_boolean, default=True, metavar="T/F", help="print statistics (default: T)")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """Those of both modes, drafters among them, a group each; one that is not given is None."""
    group = parser.add_argument_group("diffusion mode; defaults are the checkpoint's, else the reference's")
    add = group.add_argument
    add("--max-denoising-steps", type=int, help="passes per canvas at most (48)")
    add("--entropy-bound", type=float, help="nats of entropy accepted per step (0.1)")
    add("--t-min", type=float, help="temperature after the last step (0.4)")
    add("--t-max", type=float, help="temperature before the first step (0.8)")
    add("--stability-threshold", type=int, help="equal canvases in a row, beyond the first, to stop (1)")
    add("--confidence-threshold", type=float, help="mean entropy in nats below which to stop (0.005)")
    group = parser.add_argument_group("ar mode; defaults are the checkpoint's, else Gemma 4's")
    add = group.add_argument
    add("--temp", type=float, dest="temperature", help="temperature; 0 takes the most likely token (1.0)")
    add("--top-p", type=float, help="keep the most likely tokens up to this share (0.95)")
    add("--top-k", type=int, help="keep so many of the most likely tokens; 0 keeps all (64)")
    add("--min-p", type=float, help="keep tokens at least this likely, relative to the most likely one (0)")
    add("--repetition-penalty", type=float, help="above 1: make recent tokens less likely (1.0)")
    add("--repetition-context-size", type=int, help="tokens that the penalty looks back (20)")
    add("--logit-bias", type=json_object, metavar="JSON", help="added to logits, e.g. '{\"107\": -5}' (none)")
    names = "lookup, canvas[:64x2], block:FOLDER, block:HUB_ID, block:nano (none)"
    add("--drafter", metavar="NAME", help=f"guesses what follows; the answer is the same, sooner: {names}")
    add("--draft-width", type=int, metavar="N", help="tokens to draft a pass, at most 64 (what costs least time here)")
    add("--drafter-bits", type=int, metavar="N", help="block: quantise the drafter to 4 or 8 bits (as it is)")
    add("--draft-head-bits", type=int, metavar="N", help="block: guess with a head of 4 or 8 bits (the model's)")
    add("--draft-vocab", metavar="N|FILE", help="block: guess ids below N, or those of a JSON file, alone (all)")


def _boolean(text: str) -> bool:
    if text.lower() not in ("t", "true", "f", "false"):
        raise argparse.ArgumentTypeError(f"must be T or F, not {text!r}")
    return text.lower().startswith("t")


def json_object(text: str) -> dict[int, Any]:
    """{"id": number} from a command line."""
    try:
        return {int(key): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError):
        raise argparse.ArgumentTypeError(f"must be a JSON object of ids and numbers, not {text!r}") from None


def _command(args: argparse.Namespace) -> None:
    options = {name: getattr(args, name) for name in sum(MODES.values(), ()) if name != "drafts"}
    check_options(args.mode, options)
    if args.mode != "diffusion" and args.show_denoising:
        raise UsageError("--show-denoising is an option of diffusion mode; ar mode has no canvas to show")
    if args.denoising_svg is not None:
        if args.mode != "diffusion":
            raise UsageError("--denoising-svg is an option of diffusion mode; ar mode has no canvas to draw")
        require_place(args.denoising_svg)
    # what is out of range whatever the checkpoint is said before it is loaded
    check_limits(args.max_tokens, args.prefill_step_size, args.seed, args.drafter, args.draft_width)
    check_drafter(args.drafter, {name: options[name] for name in OF_A_DRAFTER})
    alone = ("t_min", "t_max") if None in (args.t_min, args.t_max) else ()  # their order is the checkpoint's matter
    given = {name: options[name] for name in sampler_options(args.mode) if name not in alone}
    GenerationConfig().replace(**given)
    prompt = _prompt(args)
    from .display import prefill_bar, show
    from .film import Film
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
        prefill_step_size=args.prefill_step_size,
        prompt_progress_callback=prefill_bar(),
        drafts=args.show_denoising or args.denoising_svg is not None,
        **{name: value for name, value in options.items() if name in MODES[args.mode]},
    )
    if args.denoising_svg is not None:
        film = Film(tokenizer, prompt)
        responses = film.watch(responses)
    show(responses, tokenizer, verbose=args.verbose, denoising=args.show_denoising)
    if args.denoising_svg is not None:
        film.write(args.denoising_svg)


def _prompt(args: argparse.Namespace) -> Prompt:
    if args.ignore_chat_template and (args.system_prompt or args.enable_thinking):
        raise UsageError("--ignore-chat-template leaves no place for --system-prompt or --enable-thinking")
    try:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    except UnicodeError as error:
        raise InputError(f"the prompt is not text ({error})") from None
    if not prompt.strip():
        raise UsageError("--prompt is empty; give it some text")
    check_text(prompt)
    if args.system_prompt:
        return [{"role": "system", "content": args.system_prompt}, {"role": "user", "content": prompt}]
    return prompt


if __name__ == "__main__":
    main()
