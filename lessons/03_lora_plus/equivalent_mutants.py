"""Mutants of the solutions that are no mistakes: (exercise, the line as changed by machine): why it does the same."""

EQUIVALENT = {
    ("growth_exponent",
     "return sum(((u - middle) * math.log(size) for u, size in zip(across, sizes))) / sum(((middle - u) ** 2 for u in across))"):
        "a square does not ask for the sign",
    ("lora_plus_groups",
     "groups = [{'params': [p for p in trainable if p not in fast and p.dim() >= 2], 'lr': lr, 'weight_decay': weight_decay}, {'params': [p for p in trainable if p in fast], 'lr': ratio * lr, 'weight_decay': weight_decay}, {'params': [p for p in trainable if p not in fast and p.dim() < 2], 'lr': lr, 'weight_decay': 0.0}]"):
        "the order of the groups is not promised",
    ("lora_plus_groups",
     "groups = [{'params': [p for p in trainable if p in fast], 'lr': ratio * lr, 'weight_decay': weight_decay}, {'params': [p for p in trainable if p not in fast and p.dim() < 2], 'lr': lr, 'weight_decay': 0.0}, {'params': [p for p in trainable if p not in fast and p.dim() >= 2], 'lr': lr, 'weight_decay': weight_decay}]"):
        "the order of the groups is not promised",
    ("lora_plus_groups",
     "groups = [{'params': [p for p in trainable if p in fast], 'lr': ratio * lr, 'weight_decay': weight_decay}, {'params': [p for p in trainable if p not in fast and p.dim() >= 2], 'lr': lr, 'weight_decay': weight_decay}, {'params': [p for p in trainable if p.dim() < 2], 'lr': lr, 'weight_decay': 0.0}]"):
        "B is a matrix, so among the vectors there is none of the fast ones",
    ("decay_where",
     "groups = [{'params': [p for p in trainable if p not in fast], 'lr': lr, 'weight_decay': weight_decay}, {'params': [p for p in trainable if p in fast], 'lr': ratio * lr, 'weight_decay': weight_decay / ratio}]"):
        "the order of the groups is not promised",
}
