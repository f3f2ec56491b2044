"""What a model reads of a request, and what of it does not fit."""

from dataclasses import dataclass, replace

from babl.errors import UserError
from babl.generation import GenerationConfig
from babl.generation.conversation import Reader, word_conversation, word_question
from babl.generation.sampling import LOOKUP_TOKENS
from babl.text.prompts import ANSWER_END, Message, prompt_ids
from babl.web.engine.protocol import (
    CompletionRequest,
    Counted,
    QARequest,
    Request,
    Settings,
)


@dataclass(frozen=True)
class Prepared:
    """A request as a model reads it.

    Attributes:
        prompts: In ids; several where the context is read through windows.
        windows: Code points of the context that each shows; empty where the request is not a question as in training.
        context: In which the answer is located.
        config: Of the answers.
        cut_tokens: Of what was sent and is not read.
        limit: Tokens that one prompt should not exceed.
        most: Tokens that none can exceed.
    """

    prompts: list[list[int]]
    windows: list[tuple[int, int]]
    context: str | None
    config: GenerationConfig
    cut_tokens: int
    limit: int
    most: int

    @property
    def tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.prompts))

    def rooms(self) -> list[int]:
        """Returns the tokens for which each prompt and its answer need keys and values."""
        return [len(prompt) + self.config.max_new_tokens for prompt in self.prompts]

    def counted(self) -> Counted:
        """Returns the figures for who has not sent it yet."""
        over = sum(max(0, len(prompt) - self.most) for prompt in self.prompts)
        return Counted(self.tokens - over, self.limit, self.cut_tokens + over, len(self.prompts))

    def check(self) -> None:
        """It can be read; nothing is cut off a question or the last message.

        Raises:
            UserError: It does not, or there is nothing to read.
        """
        if not all(self.prompts):
            raise UserError("the prompt is empty, and this model has no token to begin with")
        longest = max(map(len, self.prompts))
        if longest > self.most:
            raise UserError(f"the prompt has {longest} tokens, but this model reads at most {self.most}")


def prepare(request: Request, reader: Reader) -> Prepared:
    """Returns what the model reads; `babl.generation.conversation` words it, but for a completion, which is read as is.

    Raises:
        UserError: The messages are not a conversation, or the context is too long even for windows.
    """
    config = _config(request.settings)
    if isinstance(request, CompletionRequest):
        if request.echo and reader.style == "t5":
            raise UserError("echo: a T5 reads the prompt with its encoder, which gives it no probabilities")
        config = replace(config, likeliest=request.likeliest, echo=request.echo)
        given = request.prompt
        ids = prompt_ids([given], reader.tokenizer, reader.style)[0] if isinstance(given, str) else given
        return Prepared([ids], [], None, config, 0, reader.most, reader.most)
    if isinstance(request, QARequest):
        worded = word_question(request.question, request.context, reader, config.max_new_tokens)
    else:
        config = replace(config, likeliest=request.likeliest)
        messages = [Message(role=message.role, content=message.content) for message in request.messages]
        worded = word_conversation(messages, request.context, reader, config.max_new_tokens)
    windows = worded.windows if worded.question else []
    if windows:
        config = replace(config, stop_strings=(*config.stop_strings, *ANSWER_END))
    if windows and config.greedy:  # answers stand in their contexts more often than not
        config = replace(config, prompt_lookup_num_tokens=LOOKUP_TOKENS)
    context = worded.context if windows else None
    return Prepared(worded.prompts, windows, context, config, worded.cut_tokens, worded.limit, reader.most)


def _config(settings: Settings) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        stop_strings=tuple(settings.stop),
        seed=settings.seed,
    )
