"""What a folder's generation_config.json asks for that Babl does not take from there."""

import json
from pathlib import Path

# Each with the values that ask for nothing. Ref: transformers' GenerationConfig.
ALWAYS = {
    "bad_words_ids": (),
    "begin_suppress_tokens": ([],),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "repetition_penalty": (1,),
    "sequence_bias": (),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
}
WHERE_SAMPLED = {
    "do_sample": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_p": (0,),
    "temperature": (1,),
    "top_h": (),
    "top_k": (0, 50),  # 50 is what transformers writes unasked
    "top_p": (1,),
    "typical_p": (1,),
}


def unused_settings(folder: str | Path) -> str:
    """Returns a line that names the settings in generation_config.json that change answers; empty where there are none.

    Its end-of-sequence tokens are used. Everything else is decided by the options of a command or the settings of a
    request, so that answers of two models are comparable; a file that cannot be read is the tokenizer's to refuse.
    """
    file = Path(folder) / "generation_config.json"
    try:
        settings = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return ""
    if not isinstance(settings, dict):
        return ""
    names = ALWAYS | (WHERE_SAMPLED if settings.get("do_sample") else {})
    asked = [name for name in sorted(names) if settings.get(name) is not None and settings[name] not in names[name]]
    if not asked:
        return ""
    told = ", ".join(f"{name} {_short(settings[name])}" for name in asked)
    return f"{file}: not used: {told}; only this command's options decide how answers are written"


def _short(value: object) -> str:
    written = json.dumps(value)
    return written if len(written) <= 40 else f"{written[:37]}..."
