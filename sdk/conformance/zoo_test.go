package conformance_test

func zooHook() {}
