"""Mutants of the solutions that are no mistakes: (exercise, the line as changed by machine): why it does the same."""

EQUIVALENT = {
    ("next_byte_nats", "log_p = logits[:, :].log_softmax(-1)"): "gather reads only as many positions as ids[:, 1:] has: the last guess is computed and never looked at",
    ("next_byte_nats", "return -log_p.gather(-1, ids.detach()[:, 1:, None]).mean()"): "ids are whole numbers and have no gradient",
    ("adamw_step", "return (p.sub_(lr * m_hat / (v_hat.sqrt() + eps)), m, v)"): "p is a tensor of the function's own by then, made in the line above",
}
