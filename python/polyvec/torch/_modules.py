"""Modules around the ops: quantizers, losses and scorers that hold what is trained."""

from typing import Any, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from polyvec.hypercomplex import Algebra, sign_table
from polyvec.torch._hypercomplex import relation_query
from polyvec.torch._maxsim import maxsim, maxsim_pairs, scores_of_own
from polyvec.torch._quantize import vq_assign
from polyvec.torch._scan import logsumexp, score_pairs
from polyvec.torch._tensors import one_of, require_tensors, widened


def _mean_square(x: Tensor, y: Tensor) -> Tensor:
    """0 without elements, where torch's mean is NaN."""
    return functional.mse_loss(x, y, reduction="mean" if x.numel() else "sum")


class VectorQuantizer(nn.Module):
    """Replace vectors by codewords that are learned with the rest of a network.

    Parameters
    ----------
    dim : int
        Width d of the vectors.
    codebook_size : int
        Number K of codewords.
    metric : {"l2", "cosine"}
        By what the nearest codeword is chosen.
    update : {"ema", "gradient", "simvq"}
        How the codewords learn. "ema": each moves towards the mean of its vectors in every training step, without an
        optimizer. "gradient": they are parameters, drawn to their vectors by the loss. "simvq": they are C W^T with C
        fixed and normal, and W (d, d) the parameter, so that one vector moves all of them: large codebooks do not
        collapse.
    rank : int, optional
        With "gradient": the codebook is the product of two parameters (K, rank) and (rank, d).
    decay : float
        Of the moving averages of "ema".
    epsilon : float
        Added to the averaged counts of "ema", so that a codeword without vectors divides by no zero.
    commitment : float
        Weight of the part of the loss that draws vectors to codewords.
    dead_below : float
        With "ema": a codeword whose averaged count falls below this many vectors is replaced by a random vector of the
        batch, as if it had stood for just as many; none is at 0.

    Attributes
    ----------
    codebook : tensor of shape (codebook_size, dim)
        The codewords as they are now.

    Notes
    -----
    loss = commitment |x - sg(q)|^2 + |sg(x) - q|^2, means over all elements, sg: no gradient; the second part is absent
    with "ema". A batch without vectors has loss 0 and changes nothing. Averages are of one process: they are not
    synchronised among several. Runs in float32 under autocast.

    A drop-in for vector-quantize-pytorch, which returns (quantized, indices, commit_loss), too:
    `VectorQuantize(d, K, rotation_trick=False)` gives the values, gradients and codewords of `VectorQuantizer(d, K)`,
    and `SimVQ(d, K, rotation_trick=False)` those of update="simvq" with commitment=0.25, from the same codewords. Here
    the loss is a scalar, not zero in evaluation, and codewords keep their lengths with metric="cosine". `dead_below` is
    its `threshold_ema_dead_code`.

    References
    ----------
    van den Oord, Vinyals and Kavukcuoglu (2017): Neural discrete representation learning, section 3 and appendix A.1
    ("ema"). Zhu et al. (2024): Addressing representation collapse in vector quantized models with one linear layer,
    section 3 ("simvq"). Dhariwal et al. (2020): Jukebox: a generative model for music, section 3.1 (`dead_below`).

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> quantizer = pvt.VectorQuantizer(8, 32)
    >>> quantized, ids, loss = quantizer(torch.randn(4, 10, 8))
    >>> quantized.shape, ids.shape, loss.shape
    (torch.Size([4, 10, 8]), torch.Size([4, 10]), torch.Size([]))
    """

    sums: Tensor
    counts: Tensor
    basis: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        metric: str = "l2",
        update: str = "ema",
        rank: int | None = None,
        decay: float = 0.8,
        epsilon: float = 1e-5,
        commitment: float = 1.0,
        dead_below: float = 0.0,
    ) -> None:
        super().__init__()
        op = "torch.VectorQuantizer"
        self.metric = one_of(op, "metric", metric, ("l2", "cosine"))
        self.update = one_of(op, "update", update, ("ema", "gradient", "simvq"))
        if rank is not None and update != "gradient":
            raise ValueError(f"{op}: rank must be None unless update is 'gradient', got {rank}")
        if not 0 <= decay < 1:
            raise ValueError(f"{op}: decay must be in [0, 1), got {decay}")
        if not dead_below >= 0:
            raise ValueError(f"{op}: dead_below must be at least 0, got {dead_below}")
        if dead_below and update != "ema":
            raise ValueError(f"{op}: dead_below must be 0 unless update is 'ema', got {dead_below}")
        self.decay, self.epsilon, self.commitment, self.dead_below = decay, epsilon, commitment, dead_below
        normal = torch.randn(codebook_size, rank or dim) * (rank or dim) ** -0.5
        self.weight: Tensor | None = None
        if update == "ema":
            self.register_buffer("basis", normal)
            self.register_buffer("sums", normal.clone())
            self.register_buffer("counts", torch.ones(codebook_size))
        elif update == "simvq":
            self.register_buffer("basis", normal)
            self.weight = nn.Linear(dim, dim, bias=False).weight
        else:
            self.basis = nn.Parameter(normal)
            if rank is not None:
                self.weight = nn.Linear(rank, dim, bias=False).weight

    @property
    def codebook(self) -> Tensor:
        """The codewords as they are now, (codebook_size, dim)."""
        return self.basis if self.weight is None else widened(self.basis) @ widened(self.weight).T

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise vectors; in training with "ema", then move the codewords.

        Parameters
        ----------
        x : tensor of shape (..., dim), float32

        Returns
        -------
        quantized : tensor of x's shape
            Codewords; the gradient passes straight through to x.
        ids : tensor of shape (...), int64
        loss : scalar tensor
            To be added to the loss of the network.
        """
        x, codebook = widened(x), self.codebook
        quantized, ids = vq_assign(x, codebook.detach(), metric=self.metric)
        loss = self.commitment * _mean_square(x, quantized.detach())
        if self.update != "ema":
            loss = loss + _mean_square(functional.embedding(ids, codebook), x.detach())
        elif self.training and len(ids.flatten()):
            self._average(x.detach().reshape(-1, x.shape[-1]), ids.flatten())
        return quantized, ids, loss

    @torch.no_grad()
    def _average(self, x: Tensor, ids: Tensor) -> None:
        counts = torch.zeros_like(self.counts).index_add_(0, ids, torch.ones_like(x[:, 0]))
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, ids, x), 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.epsilon) / (total + len(self.counts) * self.epsilon) * total
        self.basis.copy_(self.sums / smoothed[:, None])
        if self.dead_below:
            self._replace_dead(x)

    def _replace_dead(self, x: Tensor) -> None:
        """Move dead codewords to different rows of x, as many as there are rows."""
        dead = self.counts < self.dead_below
        number = dead.cumsum(0) - 1
        dead = (dead & (number < len(x)))[:, None]
        rows = x[torch.randperm(len(x), device=x.device)[number.clamp(0, len(x) - 1)]]
        self.basis.copy_(torch.where(dead, rows, self.basis))
        self.sums.copy_(torch.where(dead, rows * self.dead_below, self.sums))
        self.counts.masked_fill_(dead[:, 0], self.dead_below)


class ResidualVectorQuantizer(nn.Module):
    """Replace vectors by sums of codewords, one of each level: a level quantizes what the levels before left.

    Parameters
    ----------
    dim : int
        Width d of the vectors.
    codebook_size : int
        Number K of codewords of a level.
    levels : int
        Number of quantizers.
    least_levels : int, optional
        Quantizer dropout: in training each call uses its first n levels alone, n drawn uniformly from least_levels to
        levels, so that every prefix of the ids decodes well. All levels when None.
    metric, update, rank, decay, epsilon, commitment, dead_below
        Of every level, as of `VectorQuantizer`.

    Attributes
    ----------
    quantizers : ModuleList of VectorQuantizer

    Notes
    -----
    Level l gets the residual x - sg(q_1 + ... + q_(l-1)), sg: no gradient. The gradient of `quantized` passes straight
    through to x, once. Drawing levels breaks the graph of `torch.compile`. Runs in float32 under autocast.

    A drop-in for vector-quantize-pytorch, which returns (quantized, indices, losses), too: `ResidualVQ(dim=d,
    codebook_size=K, num_quantizers=m, rotation_trick=False)` gives the values and codewords of
    `ResidualVectorQuantizer(d, K, m)` from the same codewords, but there the gradient of `quantized` reaches x once for
    each level. `least_levels=n` is its `quantize_dropout=True, quantize_dropout_cutoff_index=n - 1`.

    References
    ----------
    Zeghidour et al. (2021): SoundStream: an end-to-end neural audio codec, section III-C (residual quantizer, quantizer
    dropout). Lee et al. (2022): Autoregressive image generation using residual quantization, section 3.1.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> quantizer = pvt.ResidualVectorQuantizer(8, 32, 4)
    >>> quantized, ids, losses = quantizer(torch.randn(4, 10, 8))
    >>> quantized.shape, ids.shape, losses.shape
    (torch.Size([4, 10, 8]), torch.Size([4, 10, 4]), torch.Size([4]))
    >>> quantizer.decode(ids[..., :2]).shape
    torch.Size([4, 10, 8])
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        levels: int,
        *,
        least_levels: int | None = None,
        metric: str = "l2",
        update: str = "ema",
        rank: int | None = None,
        decay: float = 0.8,
        epsilon: float = 1e-5,
        commitment: float = 1.0,
        dead_below: float = 0.0,
    ) -> None:
        super().__init__()
        op = "torch.ResidualVectorQuantizer"
        if levels < 1:
            raise ValueError(f"{op}: levels must be at least 1, got {levels}")
        if least_levels is not None and not 1 <= least_levels <= levels:
            raise ValueError(f"{op}: least_levels must be in [1, {levels}], got {least_levels}")
        self.least_levels = least_levels
        self.quantizers = nn.ModuleList()
        for _ in range(levels):
            quantizer = VectorQuantizer(
                dim, codebook_size, metric=metric, update=update, rank=rank, decay=decay, epsilon=epsilon,
                commitment=commitment, dead_below=dead_below,
            )  # fmt: skip
            self.quantizers.append(quantizer)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise vectors; in training with "ema", then move the codewords.

        Parameters
        ----------
        x : tensor of shape (..., dim), float32

        Returns
        -------
        quantized : tensor of x's shape
            Sums of codewords; the gradient passes straight through to x.
        ids : tensor of shape (..., levels), int64
            -1 at levels that were dropped.
        losses : tensor of shape (levels,)
            Of each level, 0 where it was dropped: their sum is to be added to the loss of the network.
        """
        x, levels = widened(x), len(self.quantizers)
        used = levels
        if self.training and self.least_levels is not None:
            used = int(torch.randint(self.least_levels, levels + 1, ()))
        total = torch.zeros_like(x)
        ids, losses = [], []
        for quantizer in self.quantizers[:used]:
            quantized, chosen, loss = quantizer(x - total)
            total = total + quantized.detach()
            ids.append(chosen)
            losses.append(loss)
        ids += [torch.full_like(ids[0], -1)] * (levels - used)
        losses += [torch.zeros_like(losses[0])] * (levels - used)
        return total + (x - x.detach()), torch.stack(ids, -1), torch.stack(losses)

    def decode(self, ids: Tensor) -> Tensor:
        """Return the sums of codewords that ids stand for.

        Parameters
        ----------
        ids : integer tensor of shape (..., m)
            Of the first m levels; -1 adds nothing.

        Returns
        -------
        tensor of shape (..., dim)
            With the gradient of the codewords.
        """
        if ids.dim() == 0 or not 1 <= ids.shape[-1] <= len(self.quantizers):
            raise ValueError(
                f"torch.ResidualVectorQuantizer.decode: ids must have 1 to {len(self.quantizers)} levels, "
                f"got shape {tuple(ids.shape)}"
            )
        total = torch.zeros((), device=ids.device)
        for chosen, quantizer in zip(ids.unbind(-1), self.quantizers, strict=False):
            codewords = functional.embedding(chosen.clamp(min=0), cast(VectorQuantizer, quantizer).codebook)
            total = total + codewords * (chosen >= 0)[..., None]
        return total


def _check_temperature(op: str, temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be above 0, got {temperature}")
    return temperature


class MaxSimLoss(nn.Module):
    """Contrastive loss of late-interaction models: -log of the softmax of a query's MaxSim scores at its document.

    Parameters
    ----------
    temperature : float
        Scores are divided by it.

    Notes
    -----
    Beside the tokens a step keeps the scores, and an int32 for each query token and document. A similarity that is NaN
    is never a maximum, so that the loss stays finite where a document token has NaN: check the tokens of an encoder
    that may diverge.

    `MaxSimLoss()(queries, [positives, negatives_1, ...])` is PyLate's `losses.Contrastive` of these columns.

    References
    ----------
    ColBERT (Khattab and Zaharia 2020), section 3.3 (pairwise); ColBERTv2 (Santhanam et al. 2022), section 3.2
    (in-batch negatives).

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> queries, docs = torch.eye(4)[:2, None], torch.eye(4)[:3, None]  # one token each; the third is a negative
    >>> pvt.MaxSimLoss()(queries, docs)  # log(e + 1 + 1) - 1
    tensor(0.5514)
    """

    def __init__(self, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = _check_temperature("torch.MaxSimLoss", temperature)

    def forward(
        self,
        queries: Any,
        docs: Any,
        negatives: Any = None,
        *,
        query_mask: Any = None,
        doc_mask: Any = None,
        negative_mask: Any = None,
    ) -> Tensor:
        """Return the mean loss of the queries.

        Parameters
        ----------
        queries : n token sets
            As `polyvec.torch.maxsim` takes them: padded, alone or with lengths, or (values, offsets).
        docs : at least n token sets, or a list of such
            Document i is the right one for query i; all others are its negatives, the hard negatives of all queries
            among them. Sets of a list follow each other, each padded to a length of its own.
        negatives : n m token sets, optional
            No others are negatives then: document i, of n, competes with negatives i m, ..., i m + m - 1 alone. With
            m = 1 the pairwise loss.
        query_mask, doc_mask, negative_mask : bool or integer tensor of shape (n, t), optional
            Which tokens of padded sets count; integers are 0 and 1. For a list of documents a list.

        Returns
        -------
        scalar tensor
        """
        op = "torch.MaxSimLoss"
        if negatives is not None:
            right = maxsim_pairs(queries, docs, query_mask=query_mask, doc_mask=doc_mask)
            names = "queries", "negatives"
            wrong = scores_of_own(op, queries, negatives, query_mask, negative_mask, names)
            scores = torch.cat([right[:, None], wrong], 1)
            return functional.cross_entropy(scores / self.temperature, torch.zeros_like(right, dtype=torch.int64))
        if negative_mask is not None:
            raise ValueError(
                f"{op}: negative_mask must be None without negatives, "
                f"got {type(negative_mask).__name__} of shape {tuple(negative_mask.shape)}"
            )
        columns, masks = (docs, doc_mask) if isinstance(docs, list) else ([docs], [doc_mask])
        if not columns:
            raise ValueError(f"{op}: docs must not be an empty list")
        if masks is None:
            masks = [None] * len(columns)
        if not isinstance(masks, list) or len(masks) != len(columns):
            got = f"{len(masks)}" if isinstance(masks, list) else type(masks).__name__
            raise ValueError(f"{op}: doc_mask must be a list of one mask for each of {len(columns)} docs, got {got}")
        scores = torch.cat(
            [
                maxsim(queries, some, query_mask=query_mask, doc_mask=mask)
                for some, mask in zip(columns, masks, strict=True)
            ],
            1,
        )
        n, documents = scores.shape
        if documents < n:
            raise ValueError(f"{op}: docs must have a document for each query ({n}), got {documents}")
        return functional.cross_entropy(scores / self.temperature, torch.arange(n, device=scores.device))


class MaxSimDistillationLoss(nn.Module):
    """Teach a late-interaction model the scores of another: the KL divergence of softmaxes over each query's documents.

    Parameters
    ----------
    normalize : bool
        Bring the MaxSim scores of a query's documents to [0, 1] first, the least to 0 and the greatest to 1.
    temperature : float
        The scores of both are divided by it.

    Notes
    -----
    loss = mean over queries of sum_j p_j (log p_j - log s_j), p the softmax of the teacher's scores and s that of the
    MaxSim scores, both over the m documents of the query. Only those n m pairs are scored. The teacher has no gradient.

    With temperature 1 it is PyLate's `losses.Distillation`, for documents in the same order.

    References
    ----------
    ColBERTv2 (Santhanam et al. 2022), section 3.2. Hinton, Vinyals and Dean (2015): Distilling the knowledge in a
    neural network, section 2.

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> queries, docs = torch.eye(2)[:, None], torch.eye(2)[[0, 1, 1, 0], None]  # two documents a query
    >>> pvt.MaxSimDistillationLoss()(queries, docs, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor(0.)
    """

    def __init__(self, *, normalize: bool = True, temperature: float = 1.0) -> None:
        super().__init__()
        self.normalize = normalize
        self.temperature = _check_temperature("torch.MaxSimDistillationLoss", temperature)

    def forward(
        self, queries: Any, docs: Any, teacher: Tensor, *, query_mask: Any = None, doc_mask: Any = None
    ) -> Tensor:
        """Return the mean loss of the queries.

        Parameters
        ----------
        queries : n token sets
            As `polyvec.torch.maxsim` takes them: padded, alone or with lengths, or (values, offsets).
        docs : n m token sets
            Documents i m, ..., i m + m - 1 are those of query i.
        teacher : tensor of shape (n, m)
            Scores, logits of a softmax; -inf leaves a document out, for queries of fewer than m.
        query_mask, doc_mask : bool or integer tensor of shape (n, t), (n m, t), optional
            Which tokens of padded sets count; integers are 0 and 1.

        Returns
        -------
        scalar tensor
        """
        op = "torch.MaxSimDistillationLoss"
        require_tensors(op, teacher=teacher)
        scores = scores_of_own(op, queries, docs, query_mask, doc_mask)
        if teacher.shape != scores.shape:
            raise ValueError(f"{op}: teacher must have shape {tuple(scores.shape)}, got {tuple(teacher.shape)}")
        teacher = teacher.detach().to(scores.dtype)
        absent = teacher == -torch.inf
        scores = scores.masked_fill(absent, 0)
        if self.normalize and scores.numel():
            least = scores.masked_fill(absent, torch.inf).amin(1, keepdim=True)
            most = scores.masked_fill(absent, -torch.inf).amax(1, keepdim=True)
            span = most - least
            scores = (scores - least) / span.masked_fill(span == 0, 1)
        student = functional.log_softmax((scores / self.temperature).masked_fill(absent, -torch.inf), 1)
        target = functional.log_softmax(teacher / self.temperature, 1)
        terms = target.exp() * (target - student)
        return terms.masked_fill(absent, 0).sum() / max(len(scores), 1)


class _Rows(torch.autograd.Function):
    """Rows of a table whose gradient is a sparse tensor: an optimizer then touches these rows alone."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.shape = table.shape
        ctx.save_for_backward(ids)
        return table.index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(ids[None], grad, ctx.shape, check_invariants=False), None


class RelationScorer(nn.Module):
    """Embeddings of a knowledge graph in a hypercomplex algebra, and the scores of its triples.

    score(h, r, t) = <q, t> + bias_t, or -|q - t|^2 + bias_t, with q = h (*) r / |r| (+ translation_r).

    Parameters
    ----------
    num_entities, num_relations : int
        Count reciprocals as relations of their own.
    dim : int
        Numbers in an embedding: 4 dim components for quaternions.
    algebra : {"quaternion", "dihedron", "complex", "octonion"}, (a, b), or a C x C table
    metric : {"ip", "l2"}
    translate : bool
        Learn a translation a relation.
    bias : bool
        Learn a number an entity.
    dropout : float
        Of the elements of q, in training.
    sparse : bool
        Give `entities` and `biases` sparse gradients, for `torch.optim.Adagrad`, `SparseAdam` or `SGD`: a step with
        given tails or sampled negatives costs what its entities cost, however many the graph has. Scores of all
        entities make gradients dense.

    Attributes
    ----------
    entities : parameter of shape (num_entities, C, dim)
    relations : parameter of shape (num_relations, C, dim)
    translations : parameter of shape (num_relations, C, dim), or None
    biases : parameter of shape (num_entities,), or None

    Notes
    -----
    `polyvec.retrieve.LinkPredictor` takes these parameters and ranks triples by the same scores. Runs in float32 under
    autocast, except that products with all entities or with shared negatives obey autocast. `torch.compile` without a
    graph break unless `sparse`.

    References
    ----------
    QuatE (Zhang et al. 2019), section 4. Lacroix, Usunier and Obozinski (2018): Canonical tensor decomposition for
    knowledge base completion, section 3 (the loss over all entities, reciprocals).

    Examples
    --------
    >>> import torch, polyvec.torch as pvt
    >>> scorer = pvt.RelationScorer(100, 6, 16)
    >>> heads, relations, tails = torch.tensor([[3, 4], [0, 5], [7, 99]])
    >>> scorer(heads, relations).shape, scorer(heads, relations, tails[:, None]).shape
    (torch.Size([2, 100]), torch.Size([2, 1]))
    >>> scorer.loss(heads, relations, tails, negatives=8).backward()
    """

    def __init__(
        self,
        num_entities: int,
        num_relations: int,
        dim: int,
        *,
        algebra: Algebra = "quaternion",
        metric: str = "ip",
        translate: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.algebra, self.dropout, self.sparse = algebra, dropout, sparse
        self.metric = one_of("torch.RelationScorer", "metric", metric, ("ip", "l2"))
        components = len(sign_table(algebra))
        self.entities = nn.Parameter(0.1 * torch.randn(num_entities, components, dim))
        self.relations = nn.Parameter(torch.randn(num_relations, components, dim))
        self.translations = nn.Parameter(torch.zeros(num_relations, components, dim)) if translate else None
        self.biases = nn.Parameter(torch.zeros(num_entities)) if bias else None

    def embed(self, ids: Tensor) -> Tensor:
        """Return embeddings of entities, as a regulariser needs them: with sparse gradients where the scorer has them.

        Parameters
        ----------
        ids : integer tensor of any shape

        Returns
        -------
        tensor of shape (*ids.shape, C, dim)
        """
        return self._rows(self.entities, ids)

    def forward(self, head_ids: Tensor, relation_ids: Tensor, tail_ids: Tensor | None = None) -> Tensor:
        """Score tails: all of them (1-vs-all), or some for each pair.

        Parameters
        ----------
        head_ids, relation_ids : integer tensors of shape (n,)
        tail_ids : integer tensor of shape (n, m), optional

        Returns
        -------
        tensor of shape (n, num_entities), or (n, m) with `tail_ids`
            Higher is better.
        """
        if tail_ids is None or not self.sparse:
            queries = self._queries(self.entities, head_ids, relation_ids)
            if tail_ids is None:
                return self._scores_of_all(queries, self.entities, self.biases)
            return self._scores(queries, self.entities, self.biases, tail_ids)
        queries = self._queries(self.embed(head_ids), _running(head_ids), relation_ids)
        names, places = tail_ids.unique(return_inverse=True)  # each row once, however many pairs have it
        return self._scores(queries, self.embed(names), self._biases_of(names), places)

    def loss(
        self, head_ids: Tensor, relation_ids: Tensor, tail_ids: Tensor, *, negatives: int | Tensor | None = None
    ) -> Tensor:
        """Return the mean -log softmax of the right tails, among all entities or among sampled ones.

        Parameters
        ----------
        head_ids, relation_ids, tail_ids : integer tensors of shape (n,)
        negatives : int or integer tensor of shape (m,) or (n, m), optional
            Wrong tails: how many to draw uniformly, the same for all triples; or which, for all triples (m,) or for
            each (n, m). A triple's right tail among them does not count. All entities when None.

        Returns
        -------
        scalar tensor

        Raises
        ------
        ValueError
            Fewer than one negative to draw.
        IndexError
            On a CPU, an id outside the entities or the relations.

        Notes
        -----
        Negatives cost 2 n m C dim flops. Where they are the same for all triples that is one product, and m embeddings
        are fetched instead of n m: thousands of them take the time of dozens for each.

        Among all entities, the n N scores are not stored where `polyvec.torch.logsumexp` is no slower: on a CPU without
        autocast, with at least 2^13 C dim scores and C dim up to 1024. There it has first derivatives only.
        """
        tail_ids = tail_ids.long()  # cross_entropy takes no others
        if negatives is None:
            if not self._pays_to_store_no_scores(len(head_ids)):
                return functional.cross_entropy(self(head_ids, relation_ids), tail_ids)
            queries = self._queries(self.entities, head_ids, relation_ids)
            right = self._scores(queries, self.entities, self.biases, tail_ids[:, None])[:, 0]
            return (logsumexp(queries, self.entities.flatten(1), metric=self.metric, bias=self.biases) - right).mean()
        others: Any = negatives
        if not isinstance(others, Tensor):
            op = "torch.RelationScorer.loss"
            if isinstance(others, bool) or not hasattr(others, "__index__"):
                raise TypeError(f"{op}: negatives must be an integer or a tensor, got {type(others).__name__}")
            if others < 1:
                raise ValueError(f"{op}: negatives must be at least 1, got {others}")
            others = torch.randint(len(self.entities), (int(others),), device=tail_ids.device)
        if others.ndim == 1:
            scores = self._scores_among(head_ids, relation_ids, tail_ids, others)
        else:
            scores = self(head_ids, relation_ids, torch.cat([tail_ids[:, None], others], 1))
        right_ones = functional.pad(others == tail_ids[:, None], (1, 0))
        return functional.cross_entropy(scores.masked_fill(right_ones, -torch.inf), torch.zeros_like(tail_ids))

    def _pays_to_store_no_scores(self, n: int) -> bool:
        """Whether passes over the scores would take longer than one more product, as timed on a Zen 3 core."""
        width = self.entities[0].numel()
        slower = self.entities.is_cuda or torch.is_autocast_enabled("cpu")
        return not slower and width <= 1024 and n * len(self.entities) >= width << 13

    def _scores_among(self, head_ids: Tensor, relation_ids: Tensor, tail_ids: Tensor, negatives: Tensor) -> Tensor:
        """Return the scores of the right tails, then those of negatives that all triples share, shape (n, 1 + m)."""
        sizes = [len(head_ids), len(tail_ids), len(negatives)]
        ids = torch.cat([head_ids, tail_ids, negatives])  # fetched at once: one gradient of the whole table, not three
        heads, tails, others = self.embed(ids).split(sizes)
        each = _running(head_ids)
        queries = self._queries(heads, each, relation_ids)
        right = self._scores(queries, tails, self._biases_of(tail_ids), each[:, None])
        return torch.cat([right, self._scores_of_all(queries, others, self._biases_of(negatives))], 1)

    def _rows(self, table: Tensor, ids: Tensor) -> Tensor:
        flat = ids.flatten().long()  # indexing would take -1 for the last row
        rows: Tensor = _Rows.apply(table, flat) if self.sparse else table.index_select(0, flat)
        return rows.view(*ids.shape, *table.shape[1:])

    def _biases_of(self, ids: Tensor) -> Tensor | None:
        return None if self.biases is None else self._rows(self.biases, ids)

    def _queries(self, entities: Tensor, head_ids: Tensor, relation_ids: Tensor) -> Tensor:
        queries = relation_query(
            entities, self.relations, head_ids, relation_ids, algebra=self.algebra, translations=self.translations
        )
        return functional.dropout(queries, self.dropout, self.training)

    def _scores(self, queries: Tensor, entities: Tensor, biases: Tensor | None, tail_ids: Tensor) -> Tensor:
        scores = score_pairs(queries, entities.flatten(1), tail_ids, metric=self.metric, bias=biases)
        return -scores if self.metric == "l2" else scores

    def _scores_of_all(self, queries: Tensor, entities: Tensor, biases: Tensor | None) -> Tensor:
        entities = entities.flatten(1)
        scores = queries @ entities.T
        if self.metric == "l2":
            scores = 2 * scores - queries.square().sum(1, keepdim=True) - entities.square().sum(1)
        return scores if biases is None else scores + biases


def _running(ids: Tensor) -> Tensor:
    return torch.arange(len(ids), device=ids.device)
