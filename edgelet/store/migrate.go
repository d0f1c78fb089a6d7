package store

import "fmt"

// A migration brings the buckets of a file from one schema to the next. It runs once,
// in one transaction with the new number, and has a test with a file of the old schema.
type migration struct {
	what string
	run  func(*Tx) error
}

// migrations are all there ever were, in order; the schema's number is how many have run.
func migrations() []migration {
	return []migration{
		{"begin: the schema of the package comment", func(*Tx) error { return nil }},
	}
}

// migrate refuses a file of a newer program, drops the values that are damaged, and
// runs the migrations that the file has not seen.
func (d *DB) migrate(steps []migration, damaged []place) error {
	schema, err := 0, error(nil)
	for _, p := range damaged {
		if p == (place{metaBucket, metaSchema}) {
			schema = len(steps) // the likeliest by far: no migration is older than its program
		}
	}
	if schema == 0 {
		if schema, err = d.Meta().Schema(); err != nil {
			return fmt.Errorf("store %s: schema: %w", d.path, err)
		}
	}
	if schema > len(steps) {
		return fmt.Errorf("store %s: %w: it has schema %d and this one knows %d; install the newer version again, or begin anew with 'edgelet reset'",
			d.path, ErrSchema, schema, len(steps))
	}
	if err := d.drop(damaged, schema); err != nil {
		return err
	}
	for n, step := range steps[schema:] {
		err := d.Update(func(tx *Tx) error {
			if err := step.run(tx); err != nil {
				return err
			}
			return tx.putJSON(metaBucket, metaSchema, schema+n+1)
		})
		if err != nil {
			return fmt.Errorf("store %s: migration %d (%s): %w", d.path, schema+n+1, step.what, err)
		}
		d.log.Info("store migrated", "path", d.path, "schema", schema+n+1, "what", step.what)
	}
	return nil
}

// drop removes damaged values. The schema's number alone is known, and written again.
func (d *DB) drop(damaged []place, schema int) error {
	if len(damaged) == 0 {
		return nil
	}
	queues := map[string]bool{}
	err := d.Update(func(tx *Tx) error {
		for _, p := range damaged {
			if err := tx.delete(p.bucket, p.key); err != nil {
				return err
			}
			if p == (place{metaBucket, metaSchema}) {
				if err := tx.putJSON(p.bucket, p.key, schema); err != nil {
					return err
				}
			}
			queues[p.bucket] = queues[p.bucket] || p.key == countersKey || tx.has(p.bucket, countersKey)
		}
		for bucket, is := range queues {
			if is {
				if err := recount(tx, bucket); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("store %s: drop damaged values: %w", d.path, err)
	}
	for i, p := range damaged {
		if i == 20 {
			d.damage("%d more values were damaged and are dropped", len(damaged)-i)
			break
		}
		d.damage("the value %s/%q was damaged and is dropped", p.bucket, p.key)
	}
	return nil
}
