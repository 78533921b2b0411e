"""How likely a model finds given answers: of a multiple choice, without letters and without a judge.

Dimensions: N packed rows, L tokens of answers, V tokens of the vocabulary, R rows of a video, C channels of the tower.
"""

from collections.abc import Sequence

import torch

from fastvid.batch import Features
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import pack
from fastvid.inference.chat import Chat

_MOST_SCORES = 1 << 26  # logits that lie in memory together


@torch.inference_mode()
def answer_likelihoods(
    chat: Chat,
    video: str,
    features_RC: Features,
    choices: Sequence[tuple[str, Sequence[str]]],
    *,
    most_rows: int = 8192,
) -> list[list[tuple[float, int]]]:
    """(log-likelihood, tokens) of each option of each question about one video, the </s> that ends it included.

    Options of a question, and with the video first all questions, share the rows that they begin with.

    Args:
        chat: `fastvid.inference.chat.Chat`.
        video: name of the features.
        features_RC: [R, C].
        choices: (question, options) pairs.
        most_rows: of samples, laid end to end, that pass the model together, unless one question has more.

    Raises:
        ValueError: a text that cannot be asked, or a prompt longer than the model's context.
    """
    samples = [
        [_sample(chat, video, features_RC, question, option) for option in options] for question, options in choices
    ]
    found, group = [], []
    for each in samples:
        if group and sum(len(sample.token_ids) for of_question in [*group, each] for sample in of_question) > most_rows:
            found += _of(chat, features_RC, group)
            group = []
        group.append(each)
    return found + (_of(chat, features_RC, group) if group else [])


def _sample(chat, video, features_RC, question, option):
    """The prompt with the option behind it, whose tokens are supervised."""
    ids = chat.prompt(features_RC, question, answer=option)
    prompt = chat.prompt(features_RC, question)
    context = chat.model_config.decoder.context
    if len(ids) > context:
        raise ValueError(
            f"question and option have {len(ids)} tokens, the model's context {context}: shorten the question or use "
            "fewer frames"
        )
    # A tokenizer may join the first letters of an answer to what stands before it.
    start = next((i for i, (one, other) in enumerate(zip(ids, prompt)) if one != other), len(prompt))
    return EncodedSample(option, ids, [(start, len(ids))], [video])


def _of(chat, features_RC, group):
    """The result for some questions, one list for each."""
    model, samples = chat.model, [sample for of_question in group for sample in of_question]
    batch = pack(
        [(sample, [features_RC]) for sample in samples],
        chat.tokenizer.tokens,
        chat.model_config.channels,
        share=True,
        branches=False,
    ).to(chat.device)
    h_LD = model.decoder(
        model.splice(batch), batch.positions, batch.layout, supervised=(batch.loss_rows, batch.loss_layout)
    )
    rows = max(1, _MOST_SCORES // model.config.decoder.vocab_size)
    logs = [
        -torch.nn.functional.cross_entropy(model.logits(part_LD), targets, reduction="none")
        for part_LD, targets in zip(h_LD.split(rows), batch.targets.split(rows))
    ]
    sizes = [sample.supervised[0][1] - sample.supervised[0][0] for sample in samples]
    each = iter([(logs.sum().item(), size) for logs, size in zip(torch.cat(logs).double().split(sizes), sizes)])
    return [[next(each) for _ in of_question] for of_question in group]
