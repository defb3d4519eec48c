"""Published records become exact conversations, or raise an error with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmvl.data.conversion.conversations import UnusableError, conversation, image_names, record_id, sample_type
from ssmvl.data.conversion.media import MARK
from ssmvl.processing.processor import IMAGE
from ssmvl.processing.prompts import turns

ASK = {"from": "human", "value": "What?"}
SAY = {"from": "gpt", "value": "That."}
TALK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
WITH_MARK = [{"from": "human", "value": "<image>\nWhat?"}, SAY]
TEXTS = st.text().filter(lambda text: text.strip() and MARK not in text)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4)


def llava(*turns: Any) -> dict[str, Any]:
    return {"id": "1", "conversations": list(turns)}


def error_of(record: Any, images: int = 0) -> tuple[str, str]:
    with pytest.raises(UnusableError) as raised:
        conversation(record, images)
    return raised.value.reason, raised.value.detail


def test_the_mark_equals_the_processors() -> None:
    assert MARK == IMAGE


@given(PAIRS)
def test_every_layout_preserves_the_texts(pairs: list[tuple[str, str]]) -> None:
    flat = [text for pair in pairs for text in pair]
    roles = ["user", "assistant"] * len(pairs)
    expected = [{"role": role, "content": text} for role, text in zip(roles, flat, strict=True)]
    llava_roles = ["human", "gpt"] * len(pairs)
    layouts: list[dict[str, Any]] = [
        {"conversations": [{"from": who, "value": text} for who, text in zip(llava_roles, flat, strict=True)]},
        {"conversations": [{"from": who, "value": text} for who, text in zip(roles, flat, strict=True)]},
        {"messages": expected},
        {"conversations": None, "messages": expected},
        {"texts": [{"user": user, "assistant": answer, "source": "x"} for user, answer in pairs]},
    ]
    typed = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in expected]
    layouts.append({"messages": typed})
    if len(pairs) == 1:
        layouts.append({"image_id": "5", "question": pairs[0][0], "answer": pairs[0][1], "task": "positive"})
    for record in layouts:
        original = copy.deepcopy(record)
        assert conversation(record, len(image_names(record))) == expected
        assert record == original
    turns(expected)  # every prompt can read it


def test_turns_that_llava_drops_are_dropped() -> None:
    assert conversation(llava(SAY, ASK, SAY), 0) == TALK
    assert conversation(llava({"from": "system", "value": "Be good."}, ASK, SAY), 0) == TALK
    assert conversation(llava(ASK, SAY, ASK), 0) == TALK
    assert conversation({"messages": [{"role": "system", "content": "Be good."}, *TALK]}, 0) == TALK


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        (llava(), "no question with an answer"),
        (llava(ASK), "no question with an answer"),
        (llava(SAY), "no question with an answer"),
        (llava(ASK, ASK, SAY), "turn 1 is the user's again"),
        (llava(SAY, SAY, ASK, SAY), "turn 0 is the assistant's again"),
        (llava(ASK, {"from": "tool", "value": "x"}), "unknown role 'tool'; allowed: human, user, gpt"),
        (llava(ASK, {"from": "gpt", "value": 5}), "received 5"),
        (llava(ASK, "That."), "conversations must be a list of objects"),
        (llava({"from": "human", "text": "What?"}, SAY), "turn 0 has no text; its fields are from, text"),
        ({"conversations": 5}, "conversations must be a list of objects"),
        ({"messages": True}, "messages must be a list of objects"),
        ({"conversations": "What? That."}, "conversations must be a list of objects"),
        ({"id": 1, "image": "a.jpg"}, "none of the fields conversations, messages, texts; its fields are id, image"),
        ({"question": "What?", "answer": "That."}, "none of the fields"),
        ("What?", "a record must be an object, received 'What?'"),
        (None, "a record must be an object"),
        ([ASK, SAY], "a record must be an object"),
    ],
)
def test_records_without_a_conversation(record: Any, detail: str) -> None:
    reason, message = error_of(record)
    assert reason == "no conversation"
    assert detail in message


@pytest.mark.parametrize("blank", ["", " \n\t", None, [], [{"type": "text"}]])
def test_a_blank_answer_is_rejected(blank: Any) -> None:
    assert error_of(llava(ASK, SAY, ASK, {"from": "gpt", "value": blank}))[0] == "empty answer"
    assert error_of({"image_id": "1", "question": "What?", "answer": blank, "task": ""}, 1)[0] == "empty answer"
    assert conversation(llava({"from": "human", "value": blank}, SAY), 1)[0]["content"] == (
        blank if isinstance(blank, str) else ""
    )


def test_there_are_as_many_marks_as_images_or_none() -> None:
    assert conversation(llava(*WITH_MARK), 1)[0]["content"] == "<image>\nWhat?"
    assert conversation(llava(ASK, SAY), 3) == TALK
    two = llava(*WITH_MARK, *WITH_MARK)
    assert len(conversation(two, 2)) == 4
    assert error_of(two, 1) == ("image marks", "2 <image> marks, but 1 images")
    assert error_of(llava(*WITH_MARK), 0)[0] == "image marks"
    assert error_of(llava(*WITH_MARK, WITH_MARK[0]), 2)[0] == "image marks"  # the last question is dropped
    in_answer = {"from": "gpt", "value": "<image> is a mark"}
    assert conversation(llava(WITH_MARK[0], in_answer), 1)[1]["content"] == "<image> is a mark"


@pytest.mark.parametrize(
    ("record", "names", "type_", "id_"),
    [
        ({"id": "1", "image": "coco/train2017/1.jpg", "conversations": []}, ["coco/train2017/1.jpg"], "coco", "1"),
        ({"id": 17, "image": ["vg/1.jpg", "gqa/2.jpg"]}, ["vg/1.jpg", "gqa/2.jpg"], "vg", "17"),
        ({"id": "a", "image": "00453/004539375.jpg"}, ["00453/004539375.jpg"], "", "a"),
        ({"id": None, "image": "a.jpg"}, ["a.jpg"], "", None),
        ({"messages": [], "images": ["a/b.jpg"]}, ["a/b.jpg"], "a", None),
        ({"id": "t", "model": "", "conversations": []}, [], "text", "t"),
        ({"image": None}, [], "text", None),
        ({"image": ""}, [], "text", None),
        ({"image": {"path": 1}}, ["{'path': 1}"], "", None),
        (
            {"image_id": "2392588", "question": "?", "answer": "!", "task": "negative"},
            ["2392588.jpg"],
            "negative",
            "2392588",
        ),
        ({"image_id": 5, "question": "?", "answer": "!"}, ["5.jpg"], "", "5"),
        ({"image_id": "chart_1.png", "question": "?", "answer": "!"}, ["chart_1.png"], "", "chart_1.png"),
        ("no object", [], "text", None),
    ],
)
def test_names_type_and_id(record: Any, names: list[str], type_: str, id_: str | None) -> None:
    assert image_names(record) == names
    assert sample_type(record, names) == type_
    assert record_id(record) == id_


def question(content: Any, **fields: Any) -> dict[str, Any]:
    return {**fields, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "That."}]}


PIXELS = {"type": "image"}


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([PIXELS, {"type": "text", "text": "What?"}], "<image>\nWhat?"),
        ([PIXELS, {"type": "text", "text": "\nWhat?"}], "<image>\nWhat?"),
        ([{"type": "text", "text": "Is "}, PIXELS, {"type": "text", "text": " this?"}], "Is <image> this?"),
        ([PIXELS, {"type": "image", "index": 1}, {"type": "input_text", "text": "Same?"}], "<image>\n<image>\nSame?"),
        ([{"type": "text", "text": "What?"}], "What?"),
    ],
)
def test_typed_parts_become_one_text_with_marks(parts: list[Any], text: str) -> None:
    record = question(parts, images=["a.jpg"] * text.count(MARK))
    assert conversation(record, text.count(MARK))[0]["content"] == text


def test_typed_parts_must_use_the_images_in_order() -> None:
    swapped = [{"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "text", "text": "Which?"}]
    assert error_of(question(swapped, images=["a.jpg", "b.jpg"]), 2) == (
        "image marks", "typed parts use the images out of order: [1, 0]",
    )  # fmt: skip


def test_empty_conversations_and_unanswered_questions_are_dropped() -> None:
    assert conversation({"conversations": [], "messages": TALK}, 0) == TALK
    pairs = [{"user": "What?", "assistant": "That."}, {"user": "And?", "assistant": None}]
    assert conversation({"texts": pairs}, 0) == TALK


def test_typed_parts_may_name_the_images() -> None:
    url = {"type": "image_url", "image_url": {"url": "a.jpg"}}
    record = question([url, {"type": "image", "image": "file:///b/c.png"}, {"type": "text", "text": "Same?"}])
    assert image_names(record) == ["a.jpg", "/b/c.png"]
    assert len(conversation(record, 2)) == 2
    assert error_of({**record, "images": ["other.jpg", "/b/c.png"]}, 2)[0] == "unread media"


@pytest.mark.parametrize(
    ("record", "images"),
    [
        *[(question("What?", **{field: "1.bin"}), 0) for field in ("video", "videos", "audio", "audios", "speech")],
        (question("What?", image="a.jpg", video=["1.mp4"]), 1),
        *[(question("What?", **{field: "a.jpg"}), 0) for field in ("image_path", "img", "file", "picture", "Photo_1")],
        (question("What?", image_id=17), 0),
        (question("What?", pixel_values=[[1, 2]]), 0),
        (question("What?", image_bytes=b"abc"), 0),
        (question("What?", meta={"paths": [{"path": "b/a.PNG"}]}), 0),
        (question("What?", image="a.jpg", image2="b.jpg"), 1),
        (question("What?", image="a.jpg", images=["a.jpg", "b.jpg"]), 1),
        ({"messages": [{"role": "user", "content": "What?", "images": ["a.jpg"]}, TALK[1]]}, 0),
        ({"messages": [{"role": "user", "content": "What?", "image_url": "a.jpg"}, TALK[1]]}, 0),
        *[
            (question(f"{mark} What?", image="a.jpg"), 1)
            for mark in (
                "<video>", "<audio>", "<ImageHere>", "<image1>", "<image 2>", "<image_3>", "<image:4>", "<Image>",
                "<|image_1|>", "<|image|>", "<|image_pad|>", "<|AUDIO|>", "<img>a.jpg</img>", "<image_placeholder>",
                "<video_7>", "<start_of_image>", "<image_soft_token>", "<IMG_CONTEXT>", "[IMG]", "<speech>",
                "<vision_start>", "data:image/png;base64,iVBOR", "![](a.jpg)",
            )
        ],
        (question("Watch <video> and say what happens."), 0),
        (question("What?") | {"system": "x", "conversations": [ASK, {"from": "gpt", "value": "<ImageHere> That."}]}, 0),
        ({"messages": [{"role": "system", "content": "<video>"}, *TALK]}, 0),
        (question([{"type": "video", "video": "1.mp4"}, {"type": "text", "text": "What?"}]), 0),
        (question([{"type": "input_audio"}]), 0),
        (question([{"type": "text", "text": "What?", "image_url": {"url": "a.jpg"}}]), 0),
        *[(question("What?", **{field: "1"}), 0) for field in ("vid", "pic", "imageId", "image_id")],
        *[(question("What?", file=name), 0) for name in ("a.wmv", "x.flv", "a.tga", "a.jp2")],
        (question("What?", image_id=0), 0),
        (question("<image>What?", image="before/1.jpg", edited_image="after/1.jpg"), 1),
        *[(question("What?", image="a.jpg", image2=value), 1) for value in ("000123", "http://x.org/b.jpg")],
        (question("What?", image="a.jpg", video_url="https://x.org/v.mp4"), 1),
        *[(question("What?", **{field: name}), 0) for field, name in (("cloud", "x.npy"), ("document", "x.pdf"))],
        (question("[<IMG_PLH>] What?", image="a.jpg"), 1),
        (question("<|audio_bos|> What?"), 0),
        (question([{"type": "text", "value": "What?"}]), 0),
        (question("What?", image="a.jpg", image_2=b"\xff\xd8\xff\xe0"), 1),
    ],
)  # fmt: skip
def test_records_with_unread_media_are_rejected(record: Any, images: int) -> None:
    assert error_of(record, images)[0] == "unread media"


@pytest.mark.parametrize(
    ("record", "images"),
    [
        (question("How do I close a <div>?"), 0),
        (question("What is <video controls> in HTML?"), 0),
        (question("Mend this: <video><source src='a.mp4'></video>"), 0),
        *[(question(f"What is {tag}?"), 0) for tag in ("List<Image>", "Flow<Video>", "Pair<Image 1>", "[IMG]x[/IMG]")],
        (question("Why is url(data:image/png;base64,iVBOR) slow?"), 0),
        (question("What?", video=None, audio=[], image="", has_image=False, num_images=0), 0),
        *[
            (question("What?", **{field: value}), 0)
            for field, value in (
                ("median_score", 1), ("intermediate_steps", ["a"]), ("remediation", "x"), ("soundness", 3),
                ("social_media", "x"), ("media_type", "text"), ("speech_act", "ask"), ("model", "gpt-4"),
            )
        ],
        (question("What?", image="a.jpg", clip=0.31, frames=1, sound=True), 1),
        (question("What?", image="coco/a.jpg", file_name="a.jpg", image_id=5, image_size=[3, 4]), 1),
        (question("What?", image="a.jpg", coco_url="http://example.org/x.jpg"), 1),
        (question("What?", image="a.jpg", caption="Photo.jpg", Original_Caption="DSC_1.jpg", phash=b"12345678"), 1),
        (question("What?", image="a.jpg", original="b.jpg", bbox=[0.1, 0.2]), 1),
        (question("What?", filename="a.jpg", image_path="x/a.jpg", sha256=b"12345678"), 1),  # the image came as bytes
        *[
            (llava(ASK, {"from": "gpt", "value": text}), 0)
            for text in (
                "Write <video> and </video> around it.", "useRef<AudioContext>(null)", "Use <ImageContent>.",
                "class <ImageContext>", "List<Image 1>", "<image><url>a</url></image>",
            )
        ],
    ],
)  # fmt: skip
def test_other_fields_and_tags_in_an_answer_are_not_media(record: Any, images: int) -> None:
    assert len(conversation(record, images)) == 2


def test_marks_only_outside_of_the_questions_are_rejected() -> None:
    record = {"messages": [{"role": "system", "content": "<image>"}, *TALK]}
    for images in (0, 1):
        assert error_of(record, images) == ("image marks", "<image> marks only outside the user's questions")
    assert error_of(llava(ASK, {"from": "gpt", "value": "<image>"}), 1)[0] == "image marks"


def test_a_named_image_without_bytes_is_missing() -> None:
    assert error_of(question("What?", image="a.jpg"), 0) == ("missing image", "a.jpg not found")
    assert error_of(question("What?", images=["a.jpg", "b.jpg"]), 1) == ("missing image", "b.jpg not found")


def test_details_are_short() -> None:
    assert len(error_of({"conversations": "x" * 10_000})[1]) < 400


def test_a_lone_surrogate_becomes_a_question_mark() -> None:
    turns_read = conversation(llava({"from": "human", "value": "a\ud83db"}, {"from": "gpt", "value": "\U0001f600"}), 0)
    assert [turn["content"] for turn in turns_read] == ["a?b", "\U0001f600"]
