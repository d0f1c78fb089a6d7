package volume

const victimDir = "SKERRY_VOLUME_TEST_VICTIM"

func beKilled() {}
