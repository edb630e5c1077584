"""pytest's own options. Here, because pytest reads options from the root's conftest.py only."""


def pytest_addoption(parser):
    parser.addoption("--answers", default="exercises", choices=["exercises", "solutions", "wrong_answers", "committed"],
                     help="which answers the lessons' tests judge (committed: the exercises as git's last commit has them)")
