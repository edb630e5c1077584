"""What things cost and which method wins.

    ledger      what an adapted model costs, measured          formulas    the closed formulas beside it          shapes      of models that are not here
    compare     the fair fight: every run                      scoreboard  what the runs say                      claims      the papers' headlines, judged
    capacity    facts remembered against rank
"""
