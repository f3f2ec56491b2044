"""What a model learns with dropout that belongs to the example is what it learns with torch's own."""

import statistics

import pytest
import torch
from scipy import stats

from babl.data.collate import collate, make_features
from babl.data.fictional import fictional_examples
from babl.data.loader import BatchConfig, Loader, plan_epoch
from babl.data.sets import DataConfig, load_views
from babl.models.t5 import T5, T5Config
from babl.rng import dropout_keys
from babl.text import train_tokenizer
from babl.text.prompts import qa_prompt
from babl.training.loss import token_loss
from babl.training.optimizer import OptimConfig, make_optimizer

STEPS, LAST, RATE, SEEDS = 300, 30, 2e-3, 5
SHAPE = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 1}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Examples to train and to validate on, and the tokenizer's size."""
    train, dev = fictional_examples(0)
    texts = (qa_prompt(e.question, e.context, "t5") for e in train)
    tokenizer = train_tokenizer(texts, 600, tmp_path_factory.mktemp("tokenizer"))
    sets = (make_features(load_views(DataConfig(), examples)[0], tokenizer, 128, 16)[0] for examples in (train, dev))
    return *sets, tokenizer.vocab_size


def losses_after(task, seed, keyed):
    """Returns the loss of a target token over the last steps, with dropout, and on the validation set, without."""
    train, dev, size = task
    model = T5(T5Config(vocab_size=size, dropout_rate=0.1, **SHAPE)).train()
    model.init_weights(torch.Generator().manual_seed(seed))
    optimizer = make_optimizer(model, OptimConfig())
    lengths = [feature.lengths for feature in train]
    loader = Loader(lengths, [source for source, _ in lengths], BatchConfig(tokens=1024), seed, 0, 1)
    torch.manual_seed(10_000 + seed)
    trained = []
    for step in range(1, STEPS + 1):
        (indices,) = loader.next_step()
        batch = collate([train[i] for i in indices], 0, dropout_keys(seed, step, indices))
        if not keyed:
            del batch.inputs["dropout_key"]
        loss = token_loss(model, batch) / batch.targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / 20)
        optimizer.step()
        optimizer.zero_grad()
        trained.append(loss.item())
    model.eval()
    batches = [collate([dev[i] for i in part], 0, ()) for part in plan_epoch([f.lengths for f in dev], 4096, 0, 0)]
    with torch.no_grad():
        total = sum(token_loss(model, batch).item() for batch in batches)
    return statistics.mean(trained[-LAST:]), total / sum(batch.targets for batch in batches)


@pytest.mark.slow
def test_300_steps_end_where_they_end_with_torchs_dropout(task):
    torch.set_flush_denormal(True)
    ours, torchs = ([losses_after(task, seed, keyed) for seed in range(SEEDS)] for keyed in (True, False))
    for what, mine, other in zip(("training", "validation"), zip(*ours), zip(*torchs), strict=True):  # noqa: B905
        welch = stats.ttest_ind(mine, other, equal_var=False).pvalue
        paired = stats.ttest_rel(mine, other).pvalue  # a seed's weights and order are the same
        figures = (f"{statistics.mean(x):.4f} ± {statistics.stdev(x):.4f}" for x in (mine, other))
        print(f"{what} loss: keyed, torch's: {', '.join(figures)}; Welch p = {welch:.2f}, paired p = {paired:.2f}")
        assert welch > 0.01 and paired > 0.01
        assert max(mine) < 5.0, "it has learned nothing: at the start it is 6.3"
