"""The command as a user runs it: what it prints, what it says of mistakes, how it ends."""

import io
import re
import subprocess
import sys

import pytest

from mlx_dgemma import __main__ as dispatcher
from mlx_dgemma import display
from tests.helpers import NANO_VOCAB, screen, write_checkpoint
from tests.test_loading import point_outside, truncate

main = sys.modules["mlx_dgemma.generate"].main
EDIT = 'set age=44 in {"name": "Bob", "age": 31, "city": "Oslo", "job": "baker", "active": true}'
ANSWER = '{"name": "Ann", "age": 31, "city": "Oslo"}'


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """(status, stdout, stderr) of the generate command, in this process."""
    status = 0
    try:
        main(argv)
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_it_answers_and_prints_statistics_as_mlx_lm_does(capsys):
    status, out, err = run(capsys, "--prompt", "json name=Ann age=31 city=Oslo")
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[:3] == ["==========", ANSWER, "=========="]
    assert [line.split(":")[0] for line in lines[3:]] == ["Prompt", "Generation", "Forwards", "Peak memory"]
    assert "per token" in lines[5]


def test_quiet_prints_the_answer_alone(capsys):
    assert run(capsys, "--prompt", "json name=Ann age=31 city=Oslo", "--verbose", "F")[1] == ANSWER + "\n"


def test_the_prompt_from_standard_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("json name=Ann age=31 city=Oslo"))
    assert run(capsys, "--prompt", "-", "--verbose", "F")[1] == ANSWER + "\n"


def test_denoising_is_shown_line_by_line_where_there_is_no_terminal(capsys):
    _, out, _ = run(capsys, "--prompt", "json name=Ann age=31 city=Oslo", "--show-denoising")
    steps = [line for line in out.splitlines() if line.startswith("[canvas 0 step ")]
    assert len(steps) >= 2
    assert steps[-1].endswith(repr(ANSWER))
    assert "\x1b" not in out


def test_denoising_in_a_terminal_redraws_the_canvas(capsys, monkeypatch):
    monkeypatch.setattr(display, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = run(capsys, "--prompt", "json name=Ann age=31 city=Oslo", "--show-denoising", "--verbose", "F")
    assert out.rpartition("\x1b[J")[2] == ANSWER + "\n", "the canvas is erased before the answer"
    assert screen(out) == ANSWER


def test_ar_mode_with_a_drafter(capsys):
    options = ["--prompt", EDIT, "--mode", "ar", "--temp", "0"]
    _, plain, _ = run(capsys, *options, "--verbose", "F")
    status, out, err = run(capsys, *options, "--drafter", "lookup", "--draft-width", "8")
    lines = out.splitlines()
    assert (status, err, lines[1]) == (0, "", plain.strip())
    assert [line.split(":")[0] for line in lines[3:]] == ["Prompt", "Generation", "Forwards", "Drafts", "Peak memory"]
    assert re.search(r"\d+ of \d+ tokens accepted in \d+ rounds, \d\.\d\d a round; drafter \d", lines[6])
    assert re.search(r"\(0 denoise \+ \d+ encode\), 0\.\d+ per token, over \d+ positions", lines[5])


def test_sampling_options_reach_the_sampler(capsys):
    ar = ["--prompt", "json name=Ann age=31", "--mode", "ar", "--verbose", "F"]
    _, greedy, _ = run(capsys, *ar, "--temp", "0")
    assert greedy == '{"name": "Ann", "age": 31}\n'
    assert run(capsys, *ar, "--top-k", "1", "--seed", "3")[1] == greedy
    assert run(capsys, *ar, "--min-p", "1", "--seed", "3")[1] == greedy
    assert run(capsys, *ar, "--top-p", "0.000001", "--seed", "3")[1] == greedy
    assert run(capsys, *ar, "--temp", "0", "--logit-bias", '{"1": 200, "6": 200}')[1] == "\n", "an end at once"
    assert run(capsys, *ar, "--temp", "0", "--repetition-penalty", "9", "--repetition-context-size", "99")[1] != greedy


BAD = {
    "not a number": (["--max-tokens", "many"], 2, "invalid int value: 'many'; see --help"),
    "no such flag": (["--magic"], 2, "unrecognized arguments: --magic"),
    "no such folder": (["--model", "/no/such/folder"], 1, "/no/such/folder"),
    "hub without network": (["--model", "nobody/nothing"], 1, "nobody/nothing"),
    "no config": (["--model", "{empty}"], 1, "config.json: no such file"),
    "empty prompt": (["--prompt", " "], 2, "--prompt is empty"),
    "max_tokens 0": (["--max-tokens", "0"], 2, "max_tokens must be a whole number"),
    "max_tokens negative": (["--max-tokens", "-5"], 2, "max_tokens"),
    "t_min over t_max": (["--t-min", "0.9"], 2, "t_min must be below t_max"),
    "bound 0": (["--entropy-bound", "0"], 2, "entropy_bound"),
    "steps 0": (["--max-denoising-steps", "0"], 2, "max_denoising_steps"),
    "order is the checkpoint's": (["--t-max", "0.2"], 2, "t_min must be below t_max"),
    "two ways to encode": (["--ignore-chat-template", "--system-prompt", "x"], 2, "leaves no place"),
    "truncated shard": (["--model", "{truncated}"], 1, "its header says"),
    "index outside": (["--model", "{outside}"], 1, "not a file name in this folder"),
    "other mode's option": (["--temp", "0.7"], 2, "temperature is an option of ar mode"),
    "drafter in diffusion mode": (["--drafter", "lookup"], 2, "drafter is an option of ar mode"),
    "width in diffusion mode": (["--draft-width", "4"], 2, "draft_width is an option of ar mode"),
    "unknown drafter": (["--mode", "ar", "--drafter", "magic"], 2, "'magic' does not exist; there are lookup"),
    "drafter with too much": (["--mode", "ar", "--drafter", "lookup:x"], 2, "write lookup"),
    "negative width": (["--mode", "ar", "--drafter", "lookup", "--draft-width", "-1"], 2, "draft_width"),
    "width alone": (["--mode", "ar", "--draft-width", "4"], 2, "draft_width needs a drafter"),
    "temperature below 0": (["--mode", "ar", "--temp", "-1"], 2, "temperature must not be negative"),
    "bias outside": (["--mode", "ar", "--logit-bias", '{"5000": 1}'], 2, f"vocabulary has ids 0-{NANO_VOCAB - 1}"),
    "canvas in ar mode": (["--mode", "ar", "--show-denoising"], 2, "--show-denoising is an option of diffusion mode"),
    "picture in ar mode": (["--mode", "ar", "--denoising-svg", "x"], 2, "--denoising-svg is an option of diffusion"),
    "picture without a folder": (["--denoising-svg", "/no/such/x.svg"], 2, "/no/such is not a folder; create it first"),
    "picture over a folder": (["--denoising-svg", "{empty}"], 2, "is a folder; name a file"),
    "steps in ar mode": (["--mode", "ar", "--max-denoising-steps", "4"], 2, "option of diffusion mode"),
    "unknown mode": (["--mode", "magic"], 2, "magic"),
    "prefill": (["--prefill-step-size", "0"], 2, "prefill_step_size"),
    "too long": (["--prompt", "json " * 9000], 1, "tokens; the context of 8192"),
}


DAMAGE = {"{truncated}": truncate, "{outside}": point_outside}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_a_status(capsys, tmp_path, case):
    extra, expected, said = BAD[case]
    if extra[-1] in DAMAGE:
        extra = [*extra[:-1], str(write_checkpoint(tmp_path))]
        DAMAGE[BAD[case][0][-1]](tmp_path)
    extra = [text.replace("{empty}", str(tmp_path)) for text in extra]
    given = extra if "--prompt" in extra else ["--prompt", "json name=Ann", *extra]
    status, out, err = run(capsys, *given)
    assert status == expected
    assert out == ""
    assert err.count("\n") == 1 and said in err and err.startswith("mlx_dgemma.generate: ")


def test_a_bias_that_is_no_json_is_bad_usage(capsys):
    status, out, err = run(capsys, "--prompt", "x", "--mode", "ar", "--logit-bias", "107=5")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "must be a JSON object of ids and numbers, not '107=5'" in err


def test_debug_keeps_the_traceback(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        main(["--model", str(tmp_path), "--prompt", "x", "--debug"])


def program(does):
    """Python that runs a command."""
    code = f"from mlx_dgemma.command import *\ndef command(args):\n print('a report')\n {does}\n"
    return ["-c", f"{code}run_command(command, Parser(prog='it'), [])"]


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (["-m", "mlx_dgemma", "generate", "--prompt", "json name=Ann age=31 city=Oslo"], 1, ""),
        (program("return"), 1, ""),
        (program("raise UsageError('no')"), 2, "it: no\n"),
    ],
)
def test_a_reader_that_has_seen_enough_is_no_error(command, status, said, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is printed waits
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *command], **piped) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (said, status)


def test_without_any_output_all_is_well():
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, *program("return")]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True)
    assert (done.stderr, done.returncode) == ("", 0)


def test_help_appears_without_loading_mlx():
    code = "import sys; sys.argv[1:] = ['generate', '--help']\n"
    code += "from mlx_dgemma.__main__ import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert 'mlx.core' not in sys.modules, 'MLX was loaded'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-denoising-steps" in done.stdout


def test_the_dispatcher(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mlx_dgemma", "nonsense"])
    with pytest.raises(SystemExit) as end:
        dispatcher.main()
    assert end.value.code == 2
    assert "no command 'nonsense'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["mlx_dgemma"])
    dispatcher.main()
    assert "generate" in capsys.readouterr().out


def test_a_checkpoint_folder_from_elsewhere(capsys, tmp_path):
    """The tiny vocabulary does not hold the ids of the prompt: one line says so."""
    write_checkpoint(tmp_path)
    status, out, err = run(capsys, "--model", str(tmp_path), "--prompt", "window", "--ignore-chat-template", "-m", "4")
    assert (status, out) == (1, "")
    assert "the vocabulary has ids 0-130" in err
