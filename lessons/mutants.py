def mutants_asked_for(sample, folder, name):
    return []
