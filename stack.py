"""Many runs as one: networks of one shape,
each with its own weights and learning rates.

Small kernels leave a machine idle. Here R small runs are one stack: weights
(R, *shape), batches (R, B, ...), one batched product per layer, a learning rate
per replica and tensor. Each replica trains as torch.optim would train it alone,
to rounding.

    R replicas   B batch size   C classes   h inputs of a layer   δ = dloss/d(W h)
    χ = dloss_i/dlogits of a sample i

    nets = [Net() for lr in lrs]                            # any nn.Module, logits out
    rule = Rule("sgd", momentum=0.9)
    runs = make(nets[0], [list(net.parameters()) for net in nets], lrs, moments=rule.moments)
    network = module_network(nets[0], LOSSES["ce"].function)
    for step in range(steps):
        loss, = advance(runs, x, y, network, rule, step)    # x (R, B, ...), y (R, B) -> (R,)
    logits = network.forward(runs["weights"], x)            # (R, B, C)

Replicas that diverged leave by `drop_`. A bias-free MLP has a backward pass
written out (`mlp_network`), with plain SGD fused into its products:
W <- W - lr δᵀh. Needs torch only; can be copied alone. Out of scope: dropout
and BatchNorm, which need state; CUDA graphs (`advance` waits for no value, but
x, y, factor and step would have to be tensors that stay).
"""
import math
from collections import namedtuple
from functools import partial
from typing import NamedTuple

import torch
from torch.func import functional_call, vmap


# ---- losses ----

# logits (..., C), targets (...) -> loss per sample (...), derivative χ (..., C)

def _error(outputs, targets, target=1.0):
    """outputs (..., C) minus `target` times one-hot."""
    index = targets.unsqueeze(-1)
    return outputs.scatter_add(-1, index, outputs.new_full((), -target).expand(index.shape))


def ce(logits, targets, smoothing=0.0):
    """Cross-entropy (torch's cross_entropy, label_smoothing included)."""
    log_p = logits.log_softmax(-1)
    loss = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    chi = _error(log_p.exp(), targets)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * log_p.mean(-1)
        chi = _error(chi, targets, -smoothing) - smoothing / logits.shape[-1]
    return loss, chi


def mse(logits, targets):
    """(logits - one-hot)², mean over classes (torch's MSELoss)."""
    error = _error(logits, targets)
    return error.square().mean(-1), error * (2 / logits.shape[-1])


def brier(logits, targets):
    """The same on softmax probabilities p."""
    p = logits.softmax(-1)
    loss, chi = mse(p, targets)
    return loss, p * (chi - (p * chi).sum(-1, keepdim=True))


def huber(logits, targets, delta=1.0):
    """Of the errors e: e²/2 within delta, delta (|e| - delta/2) beyond;
    mean over classes (torch's huber_loss)."""
    error = _error(logits, targets)
    inner = error.clamp(-delta, delta)
    return (inner * (error - inner / 2)).mean(-1), inner / logits.shape[-1]


def hinge(logits, targets, power=1):
    """Sum over wrong classes j of max(0, 1 - z_y + z_j)^power, over C
    (torch's multi_margin_loss)."""
    index, classes = targets.unsqueeze(-1), logits.shape[-1]
    short = (1 - logits.gather(-1, index) + logits).clamp(min=0).scatter(-1, index, 0.0)
    chi = (short > 0).to(logits.dtype) if power == 1 else 2 * short
    chi = chi.scatter(-1, index, -chi.sum(-1, keepdim=True)) / classes
    return short.pow(power).sum(-1) / classes, chi


squared_hinge = partial(hinge, power=2)


# ---- the loss of the best constant logits, from class frequencies p (C,) ----

def _entropy(p, smoothing=0.0):
    p = (1 - smoothing) * p + smoothing / len(p)
    return -torch.xlogy(p, p).sum().item()


def _variance(p):
    return (p * (1 - p)).mean().item()      # mse and brier: the outputs p


def _smooth_constant(function, p, **options):
    """Minimizes a smooth convex loss by L-BFGS over the constant logits z."""
    z = torch.zeros_like(p).requires_grad_()
    classes = torch.arange(len(p), device=p.device)
    solver = torch.optim.LBFGS(
        [z], max_iter=500, tolerance_grad=1e-10, tolerance_change=0.0,
        line_search_fn="strong_wolfe")

    def expected():
        losses, chi = function(z.detach().expand(len(p), -1), classes, **options)
        z.grad = p @ chi
        return p @ losses

    solver.step(expected)
    return expected().item()


def _hinge_constant(p):
    """The hinge's linear program has a whole-numbered solution, of larger logits
    for more frequent classes: from 0, raise the best number of them by one
    while it helps."""
    p = p.sort(descending=True).values
    raises = torch.ones(len(p), len(p)).tril().to(p)
    classes = torch.arange(len(p), device=p.device)
    z, lowest = torch.zeros_like(p), math.inf
    while True:
        costs = torch.stack([p @ hinge((z + raised).expand(len(p), -1), classes)[0]
                             for raised in raises])
        if costs.min().item() >= lowest - 1e-12:
            return lowest
        lowest, z = costs.min().item(), z + raises[costs.argmin()]


# function(logits, targets, **options); constant(p, **options);
# options: {keyword: its setting in a sweep}
Loss = namedtuple("Loss", "function constant options", defaults=({},))
LOSSES = {
    "ce":            Loss(ce, _entropy, {"smoothing": "label_smoothing"}),
    "mse":           Loss(mse, _variance),
    "brier":         Loss(brier, _variance),
    "huber":         Loss(huber, partial(_smooth_constant, huber), {"delta": "huber_delta"}),
    "hinge":         Loss(hinge, _hinge_constant),
    "squared_hinge": Loss(squared_hinge, partial(_smooth_constant, squared_hinge)),
}


# ---- the stack ----

# {"weights": [(R, *shape)], "lr": [(R, 1, ...)], ...}, an entry per tensor

SCRATCH = ("grads", "calls")        # steps make it anew where it is missing


def make(model, initial, lr, weight_decay=0.0, eps=1e-8, moments=0,
         device="cpu", dtype=torch.float32):
    """The stack of R = len(initial) replicas of a model.

    initial: an iterable of R lists of weights, in the order of
    model.parameters(), or indices of earlier replicas that start with the same.
    lr, weight_decay, eps: a number, or one per replica, each a number or
    {parameter name: number}. moments: 0 for plain SGD, 1 for momentum, 2 for AdamW.
    """
    parameters, kind = dict(model.named_parameters()), {"dtype": dtype, "device": device}
    count = len(lr) if isinstance(lr, (list, tuple)) else len(initial)
    stack = {"weights": [torch.empty(count, *p.shape, **kind) for p in parameters.values()]}

    initial = iter(initial)
    with torch.no_grad():
        for r in range(count):
            source = next(initial)
            for i, weights in enumerate(stack["weights"]):
                weights[r].copy_(weights[source] if isinstance(source, int) else source[i])
            del source          # before the next one is drawn

    for key, values in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
        values = values if isinstance(values, (list, tuple)) else [values] * count
        stack[key] = []
        for name, p in parameters.items():
            column = [value[name] if isinstance(value, dict) else value
                      for value in values]      # (R,)
            stack[key].append(torch.tensor(column, **kind).view(-1, *[1] * p.ndim))

    for moment in ("first", "second")[:moments]:
        stack[moment] = [torch.zeros_like(weights) for weights in stack["weights"]]
    return stack


def state(stack):
    """What must be kept to go on."""
    return {key: tensors for key, tensors in stack.items() if key not in SCRATCH}


def drop_(stack, stays):
    """Keeps the replicas where stays (R,);
    tensor after tensor, never the whole stack twice."""
    if stays.all():
        return
    for key in SCRATCH:
        stack.pop(key, None)
    for tensors in stack.values():
        for i, tensor in enumerate(tensors):
            tensors[i] = tensor[stays]


# ---- networks: a stack's logits and gradients ----

# forward(weights, x) -> logits (R, B, ..., C)
# gradients(weights, x, y, out) -> gradients [(R, *shape)] of mean losses,
#     loss per sample (R, B, ...), logits;
#     out: a list that keeps the gradients, and their memory for the next
# descend(weights, x, y, lr) -> loss, logits:
#     gradients and plain SGD's update in one, or None
Network = namedtuple("Network", "forward gradients descend", defaults=(None,))


def module_network(model, loss, alone=False):
    """Any module: autograd through vmap.
    alone: a single replica runs without it, which keeps fast attention."""
    names = [name for name, _ in model.named_parameters()]
    # every place of every parameter, several where tied
    slots = [(i, module._parameters, key) for i, w in enumerate(model.parameters())
             for module in model.modules()
             for key, p in module._parameters.items() if p is w]

    def single(weights, x):         # functional_call costs a tenth of a small model's step
        own = [owner[key] for _, owner, key in slots]
        try:
            for i, owner, key in slots:
                owner[key] = weights[i].squeeze(0)
            return model(x[0])[None]
        finally:
            for (_, owner, key), w in zip(slots, own):
                owner[key] = w

    def forward(weights, x):
        if alone and len(weights[0]) == 1:
            logits = single(weights, x)
        else:
            logits = vmap(lambda w, x: functional_call(model, dict(zip(names, w)), x))(
                tuple(weights), x)
        # no loss in bfloat16
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def gradients(weights, x, y, out=None):
        with torch.enable_grad():
            leaves = [w.detach().requires_grad_() for w in weights]
            logits = forward(leaves, x)
            losses, chi = loss(logits.detach(), y)
            # Replicas meet nowhere: one backward pass serves all.
            grads = torch.autograd.grad(logits, leaves, chi.div_(y[0].numel()))
        return grads, losses, logits.detach()

    return Network(forward, gradients)


def mlp_network(loss, relu=True):
    """Bias-free MLP: the textbook forward and backward pass."""
    def outputs(weights, x):
        # [x, hidden activations ..., logits], each (R, B, width)
        found = [x]
        for w in weights:
            found.append(torch.bmm(found[-1], w.mT))
            if relu and w is not weights[-1]:
                found[-1].relu_()
        return found

    def forward(weights, x):
        return outputs(weights, x)[-1]

    def backward(weights, x, y, use):
        """Calls use(layer, δ, h) from the readout down;
        it may change δ and the layer's W."""
        *inputs, logits = outputs(weights, x)
        losses, delta = loss(logits, y)
        delta.div_(y[0].numel())
        for l in reversed(range(len(weights))):
            below = torch.bmm(delta, weights[l]) if l > 0 else None
            use(l, delta, inputs[l])
            if relu and l > 0:      # δ where h > 0, else 0
                below = torch.ops.aten.threshold_backward.default(below, inputs[l], 0)
            delta = below
        return losses, logits

    def gradients(weights, x, y, out=None):
        grads = [None] * len(weights) if out is None else out

        def keep(l, delta, h):
            grads[l] = torch.bmm(delta.mT, h, out=grads[l])
        return grads, *backward(weights, x, y, keep)

    def descend(weights, x, y, lr):
        def update(l, delta, h):
            weights[l].baddbmm_(delta.mul_(lr[l]).mT, h, alpha=-1)
        return backward(weights, x, y, update)

    return Network(forward, gradients, descend)


# ---- optimizers ----

class Rule(NamedTuple):
    """torch.optim.SGD ("sgd") or AdamW ("adam")."""
    optimizer: str
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    decay: bool = False     # is there any weight decay?
    clip: float = 0.0       # largest gradient norm, or 0

    @property
    def plain(self):
        return self.optimizer == "sgd" and not (self.momentum or self.decay or self.clip)

    @property
    def moments(self):
        return 2 if self.optimizer == "adam" else int(self.momentum > 0)


def advance(stack, x, y, network, rule, step=0, factor=1.0, parts=1,
            accuracy=False, average=None):
    """One optimizer step of every replica on x (R, B, ...), y (R, B, ...),
    in place; from step 0.

    Returns means over the batch before the step: [loss (R,)], with accuracy
    [loss, accuracy]. factor: of every LR (a schedule). parts: parts of the
    batch (gradient accumulation). average(tensors): averages over processes,
    in place.
    """
    if network.descend and rule.plain and parts == 1 and average is None:
        lr = stack["lr"] if factor == 1 else [factor * lr for lr in stack["lr"]]
        return _means(*network.descend(stack["weights"], x, y, lr), y, accuracy)

    grads, seen = None, []
    for x_part, y_part in zip(x.chunk(parts, 1), y.chunk(parts, 1)):
        # the first part's gradients go where those of the last step were
        out = (stack.setdefault("grads", [None] * len(stack["weights"]))
               if grads is None else None)
        added, losses, logits = network.gradients(stack["weights"], x_part, y_part, out)
        grads = added if grads is None else [a.add_(b) for a, b in zip(grads, added)]
        seen.append(_means(losses, logits, y_part, accuracy))
        del added, losses, logits           # before those of the next part are there

    means = (seen[0] if parts == 1
             else [torch.stack(values).mean(0) for values in zip(*seen)])
    if parts > 1:
        torch._foreach_div_(grads, parts)
    if average is not None:
        average([*grads, *means])
    if rule.clip:
        clip_(grads, rule.clip)
    update_(stack, grads, rule, factor, step)
    return means


def _means(losses, logits, y, accuracy):
    values = [losses, logits.argmax(-1) == y] if accuracy else [losses]
    return [value.to(logits.dtype).flatten(1).mean(1) for value in values]


def clip_(grads, largest):
    """torch.nn.utils.clip_grad_norm_ for each replica."""
    norms = torch._foreach_norm([own for g in grads for own in g])  # sums do not depend on R
    squares = torch.stack(norms).view(len(grads), -1).square()      # (tensors, R)
    factor = (largest / (sum(squares).sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, [factor.view(-1, *[1] * (g.ndim - 1)) for g in grads])


def update_(stack, grads, rule, factor, step):
    """One step of torch.optim.SGD or AdamW on every replica,
    using up the gradients."""
    if rule.optimizer == "adam":
        return (fused_adamw_ if grads[0].is_cpu else foreach_adamw_)(
            stack, grads, rule, factor, step)
    if rule.decay:
        torch._foreach_addcmul_(grads, stack["weights"], stack["weight_decay"])
    if rule.momentum:
        torch._foreach_mul_(stack["first"], rule.momentum)
        torch._foreach_add_(stack["first"], grads)
        grads = stack["first"]
    torch._foreach_addcmul_(stack["weights"], grads, [-factor * lr for lr in stack["lr"]])


def fused_adamw_(stack, grads, rule, factor, step):
    """AdamW by torch's fused kernel: it reads memory once, but takes one LR a
    call, so one call for all that share theirs."""
    if "calls" not in stack:
        stack["calls"] = _fused_calls(stack)
    count, grads = torch.tensor(step + 1.0), [g.contiguous().unbind() for g in grads]
    for (lr, decay, eps), members, w, m, v in stack["calls"]:
        torch._fused_adamw_(
            w, [grads[i][r] for i, r in members], m, v, [], [count] * len(w),
            lr=factor * lr, beta1=rule.beta1, beta2=rule.beta2,
            weight_decay=decay, eps=eps, amsgrad=False, maximize=False)


def _fused_calls(stack):
    """[((lr, weight decay, ε), [(tensor, replica)] that share them,
    weights, moments 1, 2)]."""
    groups = {}
    for i, values in enumerate(zip(stack["lr"], stack["weight_decay"], stack["eps"])):
        for r, key in enumerate(zip(*(value.flatten().tolist() for value in values))):
            groups.setdefault(key, []).append((i, r))
    kinds = ("weights", "first", "second")
    return [(key, members, *([stack[kind][i][r] for i, r in members] for kind in kinds))
            for key, members in groups.items()]


def foreach_adamw_(stack, grads, rule, factor, step):
    """AdamW in a few calls however many replicas there are,
    each with its own LR."""
    w, m, v = stack["weights"], stack["first"], stack["second"]
    lrs = [factor * lr for lr in stack["lr"]]
    root = math.sqrt(1 - rule.beta2 ** (step + 1))
    torch._foreach_lerp_(m, grads, 1 - rule.beta1)
    torch._foreach_mul_(v, rule.beta2)
    torch._foreach_addcmul_(v, grads, grads, 1 - rule.beta2)

    # W <- (1 - lr decay) W - lr size m / (√v + root ε): moments without their bias
    scale = torch._foreach_sqrt(v)
    torch._foreach_add_(scale, torch._foreach_mul(stack["eps"], root))
    if rule.decay:
        torch._foreach_mul_(
            w, [1 - lr * decay for lr, decay in zip(lrs, stack["weight_decay"])])
    size = root / (1 - rule.beta1 ** (step + 1))
    torch._foreach_addcmul_(w, torch._foreach_div(m, scale), [-lr * size for lr in lrs])
