"""Bodies as HTTP, JSON and forms define them: what is none is refused with 400, and nothing is guessed."""

import json
from contextlib import suppress
from typing import Any

import pytest

from wanduet.errors import InvalidRequestError
from wanduet.request import GenerationRequest

START = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
END = b"\r\n--b--\r\n"
MULTIPART = "multipart/form-data; boundary=b"
URLENCODED = "application/x-www-form-urlencoded"
JSON = "application/json"


def send(api: Any, body: bytes, kind: str) -> Any:
    return api.http.post("/v1/videos", content=body, headers={"content-type": kind})


BAD = [
    (rb'{"prompt": "x", "\ud800": 1}', JSON),
    (rb'{"prompt": "x", "a\udfffb": {"\ud800": ["\ud800"]}}', JSON),
    (rb'{"prompt": "x", "size": "\ud800"}', JSON),
    (rb'{"prompt": "x", "sampler": "\ud800"}', JSON),
    (rb'{"\ud800": 1, "\ud800": 2}', JSON),
    (b'{"prompt": "\xed\xa0\x80"}', JSON),
    ('{"prompt": "x"}'.encode("utf-16"), JSON),
    (b'{"prompt": "x", "guidance_scale": NaN}', JSON),
    (b'{"prompt": "x", "seed": Infinity}', JSON),
    (b'{"prompt": "x", "seed": -Infinity}', JSON),
    (b'{"prompt": "x", "seed": 1e999}', JSON),
    (b'{"prompt": "x", "guidance_scale": 1e999}', JSON),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", JSON),
    (b'{"prompt": "x", "prompt": "y"}', JSON),
    (b'{"prompt": "x", "' + b"n" * 100_000 + b'": 1}', JSON),
    (b"prompt=x&%ED%A0%80=1", URLENCODED),
    (b"prompt=%FF", URLENCODED),
    (b"prompt=\xff", URLENCODED),
    (b"prompt=x&" + b"&".join(b"f%d=1" % i for i in range(64)), URLENCODED),
    (b"prompt=x%00", URLENCODED),
    (START + b"\xff" + END, MULTIPART),
    (START + b"\xed\xa0\x80" + END, MULTIPART),
    (START.replace(b"prompt", b"\xff") + b"x" + END, MULTIPART),
    (START + "x".encode("utf-16") + END, MULTIPART + "; charset=utf-16"),
    (START + b"x\r\n--", MULTIPART),
    (START + b"x--", MULTIPART),
    (START + b"x\r\n--b-", MULTIPART),
    (START + b"x\r\n--b\r\n--", MULTIPART),
    (START + b"x\r\n--c--\r\n", MULTIPART),
    (b"", MULTIPART),
    (START + b"x" + END, 'multipart/form-data; boundary="b'),
]


def test_what_is_no_body_is_refused(api: Any) -> None:
    for body, kind in BAD:
        answer = send(api, body, kind)
        assert answer.status_code == 400, (body[:200], kind)
        error = answer.json()["error"]
        assert (set(error), error["type"]) == ({"message", "type", "param", "code"}, "invalid_request_error")
        assert len(answer.content) < 2000
    assert api.store.list().jobs == ()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ('{"prompt": "füchse 🦊"}'.encode(), JSON),
        ('{"prompt": "füchse 🦊"}'.encode("utf-8-sig"), JSON),
        (rb'{"prompt": "f\u00fcchse \ud83e\udd8a"}', JSON),
        (b"prompt=f%C3%BCchse+%F0%9F%A6%8A", URLENCODED),
        ("prompt=füchse+🦊".encode(), URLENCODED),
        (START + "füchse 🦊".encode() + END, MULTIPART),
        (START + "füchse 🦊".encode() + b"\r\n--b--", MULTIPART),
        (START + "füchse 🦊".encode() + END + b"what follows is ignored", MULTIPART),
        (START + "füchse 🦊".encode() + END, MULTIPART + "; charset=utf-8"),
    ],
)
def test_every_script_arrives_as_it_was_sent(api: Any, body: bytes, kind: str) -> None:
    answer = send(api, body, kind)
    assert (answer.status_code, answer.json()["prompt"]) == (200, "füchse 🦊")


def test_true_and_false_are_no_numbers(api: Any) -> None:
    for name in ("seed", "num_frames", "fps", "num_inference_steps", "guidance_scale", "flow_shift", "height"):
        for value in (True, False):
            assert api.refusal(**{name: value})["param"] == name
            with pytest.raises(InvalidRequestError, match="number"):
                GenerationRequest.parse(prompt="x", **{name: value})


NUMBERS = {
    "5": 5, "5.0": 5, "1e2": 100, "1E+2": 100, "+5": 5, " 5 ": 5, "5.5": None, "1e-2": None, "1_0": None, "0x10": None,
    "٥": None, "five": None, "": None, "5e": None, "--5": None, "nan": None, "inf": None, "1e9999": None,
    "9" * 5000: None, "true": None, "-1": None,
}  # fmt: skip


def test_a_forms_number_means_what_it_means_in_json(api: Any) -> None:
    for written, value in NUMBERS.items():
        answers = [
            api.http.post("/v1/videos", data={"prompt": "x", "seed": written}),
            api.http.post("/v1/videos", json={"prompt": "x", "seed": written}),
        ]
        with suppress(ValueError):
            json.loads(written)
            answers.append(send(api, b'{"prompt": "x", "seed": %s}' % written.encode(), JSON))
        for answer in answers:
            if value is None:
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "seed"), written
            else:
                assert answer.json()["settings"]["seed"] == value, written


def test_refused_bodies_keep_no_place(make_api: Any) -> None:
    from wanduet.doors.http.context import ServerSettings

    api = make_api(ServerSettings(max_submissions=1))
    for _ in range(3):
        assert send(api, START + b"x\r\n--", MULTIPART).status_code == 400
        assert send(api, b"{", JSON).status_code == 400
        assert send(api, b'{"prompt": ""}', JSON).status_code == 400
        assert api.http.post("/v1/videos/nothing/remix", json={"prompt": "x"}).status_code == 404
    assert send(api, b'{"prompt": "x"}', JSON).status_code == 200
