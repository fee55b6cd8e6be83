"""The animated picture of a canvas settling, on made-up responses and once on nano's."""

import os
import re
import sys
from xml.etree import ElementTree

import pytest

from mlx_dgemma import InputError, display, stream_generate
from mlx_dgemma.film import FRESH, HOLD, LONGEST, MOST_FRAMES, NOISE, SETTLED, SPECIAL, STEP, Film
from mlx_dgemma.response import GenerationResponse
from tests.test_display import COUNTS, Letters

main = sys.modules["mlx_dgemma.generate"].main
SVG = "{http://www.w3.org/2000/svg}"
JSON = "json name=Ann age=31 city=Oslo"
ANSWER = '{"name": "Ann", "age": 31, "city": "Oslo"}'
END = "\x03"  # the end of a turn


class Tokenizer(Letters):
    all_special_ids = (0, ord(END))

    def decode(self, ids):
        return super().decode(ids).replace(END, "<end>")


def draft(text: str, accepted: str, step: int = 1, canvas: int = 0) -> GenerationResponse:
    """A canvas; `accepted` has a + for each token that is."""
    return GenerationResponse(
        is_draft=True,
        draft_text=text,
        draft_tokens=tuple(map(ord, text)),
        draft_accepted=tuple(sign == "+" for sign in accepted),
        draft_step=step,
        canvas_index=canvas,
        **COUNTS,
    )


def final(text: str, reasoning: str = "") -> GenerationResponse:
    return GenerationResponse(text=text, reasoning=reasoning, finish_reason="stop", denoise_forwards=2, **COUNTS)


def film_of(*responses: GenerationResponse, prompt="ask") -> Film:
    film = Film(Tokenizer(), prompt)
    assert list(film.watch(responses)) == list(responses)
    return film


class Picture:
    """A film's SVG, read."""

    def __init__(self, svg: str):
        self.root = ElementTree.fromstring(svg)
        self.groups = self.root.findall(f"{SVG}g")
        self._known = {f"#{text.get('id')}": text for text in self.root.iter(f"{SVG}text") if text.get("id")}
        self.style = self.root.find(f"{SVG}style").text

    def lines(self, group: ElementTree.Element) -> list[str]:
        """The heading and the lines of a frame."""
        texts = (self._known[e.get("href")] if e.tag == f"{SVG}use" else e for e in group)
        return ["".join(text.itertext()) for text in texts if text.tag == f"{SVG}text"]

    def question(self) -> list[str]:
        return ["".join(text.itertext()) for text in self.root.findall(f"{SVG}text")]

    def visible(self, seconds: float) -> list[int]:
        """Frames that are seen at a time, by the keyframes."""
        loop, step, last = (
            float(re.search(p, self.style)[1])
            for p in (r"step ([\d.]+)s", r"step {.* ([\d.]+)% ", r"last {.* ([\d.]+)% ")
        )
        found = []
        for number, group in enumerate(self.groups):
            delay = re.search(r"animation-delay:([\d.]+)s", group.get("style", ""))
            part = 100 * ((seconds - float(delay[1] if delay else 0)) % loop) / loop
            if part < step if delay else part >= last:
                found.append(number)
        return found


def test_a_frame_per_step_and_the_answer():
    film = film_of(draft("abc", "+--"), draft("abd", "+++", step=2), final("abd"))
    picture = Picture(film.svg())
    assert [picture.lines(group) for group in picture.groups] == [
        ["canvas 0 step 1: 1/3 accepted", "abc"],
        ["canvas 0 step 2: 3/3 accepted", "abd"],
        ["1 tokens in 2 denoising steps", "abd"],
    ]
    assert picture.question() == ["› ask"]
    assert [group.get("class") for group in picture.groups] == ["step", "step", "last"]


def test_what_an_accepted_token_looks_like():
    film = film_of(draft("abc" + END, "+--+"), draft("abd" + END, "++-+", step=2), final("abd"))
    first, second = (frame.lines[0] for frame in film.frames)
    end = [(character, SPECIAL) for character in "<end>"]
    assert first == [("a", FRESH), ("b", NOISE), ("c", NOISE), *end]
    assert second == [("a", SETTLED), ("b", FRESH), ("d", NOISE), *end]


def test_a_second_canvas_follows_what_the_first_said():
    film = film_of(draft("ab\nc", "++++"), final("ab\nc"), draft("cd\0", "+--", canvas=1), final("d"))
    assert [character for character, _ in film.frames[1].lines[1]] == ["c", "c", "d"], "the pad is not drawn"
    assert film.frames[1].lines[1][1] == ("c", FRESH), "an accepted token of another canvas is no older one"
    svg = film.svg()
    assert Picture(svg).lines(Picture(svg).groups[-1])[1:] == ["ab", "cd"]
    assert svg.count(">ab</text>") == 1, "what stays is drawn once"


def test_thinking_is_set_off():
    picture = Picture(film_of(draft("x", "+"), final("", "2 + 2"), draft("x", "+", canvas=1), final("4")).svg())
    assert picture.lines(picture.groups[-1])[1:] == ["2 + 2", "---", "4"]


def test_a_film_without_an_end_stays_with_its_last_frame():
    picture = Picture(film_of(draft("abc", "+--")).svg())
    assert picture.lines(picture.groups[-1]) == picture.lines(picture.groups[0])


@pytest.mark.parametrize("steps", [1, 4, 48, 2 * MOST_FRAMES + 1])
def test_one_frame_is_seen_at_a_time_and_the_loop_is_short(steps):
    picture = Picture(film_of(*[draft("a", "-", step=i) for i in range(steps)], final("a")).svg())
    shown = len(picture.groups) - 1
    assert shown == steps if steps <= MOST_FRAMES else MOST_FRAMES / 2 < shown <= MOST_FRAMES
    loop = float(re.search(r"step ([\d.]+)s", picture.style)[1])
    pace = (loop - HOLD) / shown
    assert loop <= LONGEST and pace <= STEP + 1e-9
    for number in range(shown):
        assert picture.visible((number + 0.5) * pace) == picture.visible((number + 0.5) * pace + loop) == [number]
    assert picture.visible(loop - HOLD + 0.1) == picture.visible(loop - 0.1) == [shown]


def test_still_pictures_and_readers_without_motion_have_the_last_frame():
    style = Picture(film_of(draft("a", "+"), final("a")).svg()).style
    assert ".step { visibility: hidden;" in style
    assert not re.search(r"\.last {[^}]*visibility", style)
    assert "@media (prefers-reduced-motion: reduce) { .step, .last { animation: none } }" in style


def test_whatever_a_model_writes_is_well_formed():
    text = "<script>&amp;]]>\x1b[2J\x00\x07\ufffe  a\tb 'q' \"r\""
    film = film_of(draft(text, "+" * len(text)), final(text), prompt=text)
    picture = Picture(film.svg())
    shown = "<script>&amp;]]>[2J  a b 'q' \"r\""
    assert picture.question() == ["› " + shown]
    assert [picture.lines(group)[1] for group in picture.groups] == [shown, shown]
    assert picture.root.get("{http://www.w3.org/XML/1998/namespace}space") == "preserve"
    assert {element.tag.removeprefix(SVG) for element in picture.root.iter()} == {
        *("svg", "title", "style", "rect", "path", "circle", "g", "text", "tspan")
    }


def test_a_long_prompt_is_cut_and_lines_are_wrapped():
    film = film_of(draft("x" * 100, "+" * 100), final("y"), prompt="word " * 200)
    picture = Picture(film.svg())
    assert [len(line) for line in picture.lines(picture.groups[0])[1:]] == [80, 20]
    assert all(len(line) <= 80 for line in picture.question())
    assert picture.question()[-1] == "  …"


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}], "› one"),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "t"}]}], "› t"),
        ([104, 105], "› hi"),
    ],
)
def test_the_prompt_in_every_form(prompt, shown):
    assert Picture(film_of(draft("a", "+"), prompt=prompt).svg()).question() == [shown]


class Bytes(Tokenizer):
    """Ids are bytes, so that a character may take several."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("accepted", ["+-+--", "+++--", "+++++"])
def test_cells_are_those_of_the_terminal(monkeypatch, accepted):
    monkeypatch.setenv("COLUMNS", "81")
    tokens = tuple("aéü".encode())
    film = Film(Bytes(), "ask")
    for step, signs in enumerate(("+-+--", accepted)):
        sure = tuple(sign == "+" for sign in signs)
        response = GenerationResponse(
            is_draft=True, draft_tokens=tokens, draft_accepted=sure, draft_step=step, **COUNTS
        )
        film.add(response)
    expected = display.CanvasView(Bytes())._colored(response)
    cells = [[(character, mark != NOISE) for character, mark in line] for line in film.frames[-1].lines]
    assert [display._styled(line) for line in cells] == expected


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(InputError, match="give stream_generate drafts=True"):
        film_of(final("a")).write(tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_gone_is_said(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        film_of(draft("a", "+")).write(tmp_path / "none" / "a.svg")


def test_a_disk_that_is_full_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.svg"
    path.write_text("old")

    def full(*names):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        film_of(draft("a", "+")).write(path)
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])


def test_the_command_draws_what_it_shows(nano, tmp_path, capsys):
    path = tmp_path / "canvas.svg"
    main(["--prompt", JSON, "--denoising-svg", str(path), "--show-denoising", "--verbose", "F"])
    out, svg = capsys.readouterr().out, path.read_text(encoding="utf-8")
    picture = Picture(svg)
    steps = [line[1 : line.index("]")] for line in out.splitlines()[:-1]]
    assert [picture.lines(group)[0] for group in picture.groups[:-1]] == steps
    assert picture.lines(picture.groups[-1])[1:] == [ANSWER]
    assert picture.question() == ["› " + JSON]
    assert len(svg) < 20_000
    film = Film(nano[1], JSON)
    for response in stream_generate(*nano, JSON, drafts=True):
        film.add(response)
    assert film.svg() == svg


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError("no")])
def test_a_run_that_ends_early_leaves_nothing(monkeypatch, tmp_path, capsys, error):
    def broken(responses, tokenizer, **options):
        next(iter(responses))
        raise error

    monkeypatch.setattr(display, "show", broken)
    with pytest.raises(SystemExit):
        main(["--prompt", JSON, "--denoising-svg", str(tmp_path / "canvas.svg")])
    assert not list(tmp_path.iterdir())
