-- The placement of experts: of many routers one plans, and what it posts has a greater number than anything before it.

-- Takes the planner's lease where it is free, renews it where it is one's own. The router that holds it now.
-- keys: planner. args: router, lease ms.
local function lead(keys, args)
  local holder = redis.call('GET', keys[1])
  if not holder or holder == args[1] then
    redis.call('SET', keys[1], args[1], 'PX', args[2])
    return args[1]
  end
  return holder
end

-- Posts a placement. 1; 0 when the lease is another router's or has run out; -1 when the number is not a new one.
-- keys: planner, version, post. args: router, version, post.
local function post(keys, args)
  if redis.call('GET', keys[1]) ~= args[1] then return 0 end
  if tonumber(redis.call('GET', keys[2]) or '0') >= tonumber(args[2]) then return -1 end
  redis.call('SET', keys[2], args[2])
  redis.call('SET', keys[3], args[3])
  return 1
end

-- Gives the lease back, so that another router need not wait for its end.
-- keys: planner. args: router.
local function resign(keys, args)
  if redis.call('GET', keys[1]) == args[1] then redis.call('DEL', keys[1]) end
  return 1
end
