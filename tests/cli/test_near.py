"""A command line that is nearly right is answered with the one that was meant."""

import shlex

import pytest


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ('"a cat"', 'wanduet generate "a cat"'),
        ("a cat walks --steps 4", 'wanduet generate "a cat walks" --steps 4'),
        ('--prompt "a cat"', 'wanduet generate --prompt "a cat"'),
        ("generate a cat walks --steps 4", 'wanduet generate "a cat walks" --steps 4'),
        ("generat x", "wanduet generate x"),
        ("run", 'wanduet generate "a cat"'),
        ("run a cat --seed 3", 'wanduet generate "a cat" --seed 3'),
        ("sunset", "To make a video of it: wanduet generate sunset"),
        ("video.mp4", "wanduet inspect video.mp4"),
        ("prompts.txt", "wanduet batch prompts.txt"),
        ("list", "wanduet jobs list"),
        ("jobs lst", "wanduet jobs list"),
        ("cancel video_1", "wanduet jobs cancel video_1"),
        ("versoin", "wanduet --version"),
        ('plan "a cat" --steps 4', "wanduet plan --steps 4"),
        ("generate", "For example: wanduet generate"),
        ("inspect", "For example: wanduet inspect cat.mp4"),
        ("generate x --frame_num 81", "--num-frames"),
        ("generate x --stepz 4", "--steps"),
        ("generate x --steps", "--steps needs a value"),
        (
            "generate x --lora a.pt b.safetensors:0.5 --steps 4",
            "generate x --lora a.pt --lora b.safetensors:0.5 --steps 4",
        ),
        (f"plan --lora a.pt {'x' * 300} b.pt", "--lora a.pt PROMPT --lora b.pt"),
        ("plan --lora=a.pt b.pt --lora c.pt d.pt", "plan --lora=a.pt --lora b.pt --lora c.pt --lora d.pt"),
        ('generate --lora a.pt b.pt "a cat"', 'generate --lora a.pt --lora b.pt "a cat"'),
        ("-x", "wanduet --help"),
        (f"{'x' * 300} y", "wanduet generate PROMPT"),
    ],
)
def test_the_command_that_was_meant(wanduet, typed: str, meant: str) -> None:
    ran = wanduet(*shlex.split(typed))
    assert (ran.code, ran.out) == (2, "")
    assert meant in ran.err


def test_help_is_a_word_too(wanduet) -> None:
    assert wanduet("help", "generate").out == wanduet("generate", "--help").out
    assert wanduet("help").out == wanduet("-h").out == wanduet().out


@pytest.mark.skipif("sys.platform == 'win32'")
def test_a_suggestion_can_be_pasted(wanduet) -> None:
    prompt = "it's $5 `here`!"
    line = wanduet(prompt).err.partition("Did you mean: ")[2].strip()
    assert shlex.split(line) == ["wanduet", "generate", prompt]
