"""Proves that a training script still does what it should: `babl verify [SCRIPT]`.

The script is run as it is, in processes of its own, on tiny models and a few embedded questions. What it leaves behind,
a checkpoint after each step and metrics.jsonl, is held against the same steps computed here (`stock.py`): in fp64, one
example at a time, without the house's loop, collator, backends, optimizer or schedule. With `--self` it is held against
itself instead (`itself.py`), whatever its loss and its optimizer. What an edit changes is listed too (`edit.py`).

Covered: every combination of backend, 1 or 2 ranks, and 1 or 4 micro-batches a step, each with one of the families in
turn; unequal numbers of targets; micro-batches without any; dropout; tied and untied heads; clipping, label smoothing
and weight decay that count; a rate that rises and falls; validation in between; going on after each step, over the end
of an epoch too; and answers through the cache. All of it runs on CPUs, where the same work gives the same bytes.

What is not taken from the code that is checked:
    dropout    keys and masks are stated again (`dropout.py`) and take the place of babl's in the fp64 steps; a longer
               run is watched (`watch.py`), and its masks are held to what is known of fair coins (`observed.py`)
    order      the examples of a step are found by its logged loss, of all sets of as many with as many targets; the
               watched run's by the ids that its embeddings read
    prompts    their wording, and their ids by the `tokenizers` library (`subject.py`)
    the rest   loss, normalisation, schedule, clipping, AdamW, names of checkpoints and of clocks: stated here

What is, and why it may stay: the models' arithmetic apart from dropout, and reading and writing of their folders, which
the tests hold against transformers'; where in a model a dropout stands, likewise, but not its number; training the tiny
tokenizer and drawing the weights to start from, which only make the input; the engine, which is itself on trial.
"""
