"""How likely a model finds given answers: of a multiple choice, without letters and without a judge.

Dimensions: N packed rows, L tokens of answers, V tokens of the vocabulary, R rows of a video, C channels of the tower.
"""

from collections.abc import Sequence

import torch

from fastvid.batch import Features
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import Chain, pack
from fastvid.inference.asking import Answering

_MOST_SCORES = 1 << 26  # logits that lie in memory together


def with_options(
    chat: Answering, video: str, features_RC: Features, question: str, options: Sequence[str]
) -> list[EncodedSample]:
    """A question's prompt with each option behind it, whose tokens are supervised, for `option_likelihoods`.

    Args:
        chat: `Answering`.
        video: name of the features.
        features_RC: [R, C].

    Raises:
        ValueError: a text that cannot be asked, or a prompt longer than the model's context.
    """
    prompt = chat.prompt(features_RC, question)
    texts = [chat.prompt(features_RC, question, answer=option) for option in options]
    # A tokenizer may join the first letters of an answer to what stands before it; then all are scored from there on.
    start = min(_common(ids, prompt) for ids in texts)
    return [_sample(chat, video, option, ids, start) for option, ids in zip(options, texts)]


@torch.inference_mode()
def option_likelihoods(
    chat: Answering, features_RC: Features, questions: Sequence[Sequence[EncodedSample]], *, most_rows: int = 8192
) -> list[list[tuple[float, int]]]:
    """(log-likelihood, tokens) of each option of each question about one video, the token that ends it included.

    Options of a question, and with the video first all questions, share the rows up to the end of their video: those
    pass the model once, unless there are more rows than `most_rows`.

    Args:
        chat: `Answering`.
        features_RC: [R, C].
        questions: `with_options` of each question.
        most_rows: of samples that pass the model together, unless one question has more.
    """
    found, group, beginnings, rows = [], [], set(), 0
    for options in questions:
        own, behind = _rows(chat, options)
        more = behind + sum(size for key, size in own.items() if key not in beginnings)
        if group and rows + more > most_rows:
            found += _of(chat, features_RC, group)
            group, beginnings, rows = [], set(), 0
            more = behind + sum(own.values())
        group.append(options)
        beginnings |= own.keys()
        rows += more
    return found + (_of(chat, features_RC, group) if group else [])


def _rows(chat, options):
    """({a beginning that samples may share: its rows}, all rows behind them) of the options of a question."""
    beginnings, behind = {}, 0
    for sample in options:
        chain = Chain(sample, chat.tokenizer.tokens, share=True)
        end = max(chain.shareable, default=0)
        beginnings[chain.beginning(end) if end else ()] = end
        behind += len(sample.token_ids) - end
    return beginnings, behind


def _common(ids, prompt):
    """How many tokens of a prompt stay as they are with an answer behind it."""
    return next((i for i, (one, other) in enumerate(zip(ids, prompt)) if one != other), len(prompt))


def _sample(chat, video, option, ids, start):
    context = chat.model_config.decoder.context
    if len(ids) > context:
        raise ValueError(
            f"question and option have {len(ids)} tokens, the model's context {context}: shorten the question or use "
            "fewer frames"
        )
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
