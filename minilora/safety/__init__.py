"""What keeps a mistake from going unnoticed: of no use to an idea, and of much to whoever trains a model of their own.

    targets        which layers can carry an adapter          watch      a training loop in which a line is missing
    beside         what is trained beside the adapters        runs       runs that are stopped, or write in one place
    configuration  PEFT's rules for what is adapted           encodings  texts that are not UTF-8
    conv1d         GPT-2's layers, whose weight is transposed  recompute  blocks computed again in backward
    memory         memory that has run out, in one line
"""
