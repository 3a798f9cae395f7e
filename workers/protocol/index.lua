-- What workers and routers have Redis do in one step: as a library of functions, or as scripts where functions are refused.
-- All keys of a call carry one hash tag. WIDTH, the bytes of a member, is put in front of this text.

-- Appends one batch to the log and to the snapshot, together. 1, or 0 when it is not the batch that follows.
-- keys: log, blocks, seq. args: batch, seq, cleared, removed, stored (members, concatenated), ttl ms, log length.
local function publish(keys, args)
  local seq = tonumber(args[2])
  if args[3] == '1' then
    redis.call('DEL', keys[2])
  elseif tonumber(redis.call('GET', keys[3]) or '-1') ~= seq - 1 then
    return 0
  end
  local function each(command, blob)
    local members = {}
    for i = 1, #blob, WIDTH do
      members[#members + 1] = string.sub(blob, i, i + WIDTH - 1)
      if #members == 1000 then  -- unpack() has a limited stack
        redis.call(command, keys[2], unpack(members))
        members = {}
      end
    end
    if #members > 0 then redis.call(command, keys[2], unpack(members)) end
  end
  each('SREM', args[4])
  each('SADD', args[5])
  redis.call('PEXPIRE', keys[2], args[6])
  redis.call('SET', keys[3], args[2], 'PX', args[6])
  redis.call('XADD', keys[1], 'MAXLEN', '~', args[7], '*', 'b', args[1])
  return 1
end

-- Renews registration, lease and the index keys. The seq in Redis (-1: none), or -2 when a later life of this worker
-- holds the lease.
-- keys: workers, lease, blocks, seq. args: worker_id, epoch, info, lease ms, ttl ms.
local function heartbeat(keys, args)
  local holder = tonumber(redis.call('GET', keys[2]) or '0')
  if holder > tonumber(args[2]) then return -2 end
  redis.call('HSET', keys[1], args[1], args[3])
  redis.call('SET', keys[2], args[2], 'PX', args[4])
  redis.call('PEXPIRE', keys[3], args[5])
  redis.call('PEXPIRE', keys[4], args[5])
  return tonumber(redis.call('GET', keys[4]) or '-1')
end

-- A clean end. The registration goes only if no later life has taken the place.
-- keys: as for heartbeat. args: worker_id, epoch.
local function leave(keys, args)
  redis.call('DEL', keys[3], keys[4])
  if redis.call('GET', keys[2]) == args[2] then
    redis.call('DEL', keys[2])
    redis.call('HDEL', keys[1], args[1])
  end
  return 1
end

-- A piece of a snapshot: {seq (-1: there is none), next cursor ('0': that was all), members, concatenated}.
-- keys: blocks, seq. args: cursor, about how many.
local function snapshot(keys, args)
  local seq = tonumber(redis.call('GET', keys[2]) or '-1')
  local found = redis.call('SSCAN', keys[1], args[1], 'COUNT', args[2])
  return {seq, found[1], table.concat(found[2])}
end
