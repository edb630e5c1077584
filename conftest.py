"""pytest's own options. Here, because pytest reads options from the root's conftest.py only."""


def pytest_addoption(parser):
    parser.addoption("--answers", default="exercises", choices=["exercises", "solutions", "wrong_answers", "right_answers", "committed", "mutants"],
                     help="which answers the lessons' tests judge (committed: the exercises as git's last commit has them; mutants: the solutions, each with one "
                          "small thing changed by machine)")
    parser.addoption("--mutants", default="all", metavar="COUNT/SEED", help="with --answers=mutants: a sample, say 60/0")
