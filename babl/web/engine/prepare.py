"""Prepares a request: the prompts that a model reads, and the tokens that do not fit."""

from dataclasses import dataclass, replace

from babl.errors import UserError
from babl.generation import GenerationConfig
from babl.generation.conversation import Reader, word_conversation, word_question
from babl.generation.sampling import LOOKUP_TOKENS
from babl.text.prompts import ANSWER_END, Message, prompt_ids
from babl.web.engine.protocol import BOUNDS, CompletionRequest, QARequest, Request, Settings, TokenCount


@dataclass(frozen=True)
class Prepared:
    """A request as the model reads it.

    Attributes:
        prompts: Token ids; several if the context is read in windows.
        windows: Code points of the context in each prompt; empty unless the prompt is a question as in training.
        context: To locate the answer in.
        config: Of the decoding.
        cut_tokens: Sent, but not read.
        limit: Tokens that a prompt should not exceed.
        max_prompt: Tokens that no prompt can exceed.
    """

    prompts: list[list[int]]
    windows: list[tuple[int, int]]
    context: str | None
    config: GenerationConfig
    cut_tokens: int
    limit: int
    max_prompt: int

    @property
    def tokens(self) -> int:
        """The tokens of all prompts."""
        return sum(map(len, self.prompts))

    def cache_lengths(self) -> list[int]:
        """Returns the tokens that each prompt and its answer keep keys and values of."""
        return [len(prompt) + self.config.max_new_tokens for prompt in self.prompts]

    def count(self) -> TokenCount:
        """Returns the token count of the request."""
        over = sum(max(0, len(prompt) - self.max_prompt) for prompt in self.prompts)
        return TokenCount(self.tokens - over, self.limit, self.cut_tokens + over, len(self.prompts))

    def check(self) -> None:
        """Checks that every prompt fits; a question or the last message is never cut.

        Raises:
            UserError: A prompt is too long, or empty.
        """
        if not all(self.prompts):
            raise UserError("the prompt is empty, and this model has no token to begin with")
        longest = max(map(len, self.prompts))
        if longest > self.max_prompt:
            raise UserError(f"the prompt has {longest} tokens, but this model reads at most {self.max_prompt}")


def prepare(request: Request, reader: Reader) -> Prepared:
    """Returns what the model reads of a request.

    `babl.generation.conversation` makes the prompt, except for a completion, which is read as it is.

    Raises:
        UserError: The messages are not a conversation, or the context has too many windows.
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
    if windows and config.greedy:  # most answers can be copied from the context
        config = replace(config, prompt_lookup_num_tokens=LOOKUP_TOKENS)
    context = worded.context if windows else None
    return Prepared(worded.prompts, windows, context, config, worded.cut_tokens, worded.limit, reader.most)


def _config(settings: Settings) -> GenerationConfig:
    sampling = {name: getattr(settings, name) for name in BOUNDS}
    return GenerationConfig(**sampling, stop_strings=tuple(settings.stop))
