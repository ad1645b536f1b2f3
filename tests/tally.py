"""How many inputs randomised tests have tried, said past pytest's capture."""


def print_tally(request, counts):
    tried = ", ".join(f"{name} {count}" for name, count in counts.items())
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\ninputs tried: {sum(counts.values())} ({tried})")
